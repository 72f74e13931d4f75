#!/usr/bin/env bash
# run_in_two.sh PROGRAM TESTS: these tests, '[tag]' or 'name*', and all others beside them, for most keep one core busy.
# What they counted is added up in a last line, as one process would print it.
set -u
these=$(mktemp) others=$(mktemp) && trap 'rm -f "$these" "$others"' EXIT
"$1" "$2" >"$these" 2>&1 &
"$1" "~[.]~$2" 2>&1 | tee "$others"  # ~[.]: without the hidden ones, which a filter would bring in
code=${PIPESTATUS[0]}
wait $! || code=1
echo "the tests $2:"
cat "$these"
counts=$(cat "$others" "$these" | grep -E '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$')
[ "$(wc -l <<<"$counts")" = 2 ] || { echo 'a part of the tests did not end' && exit 1; }
awk '{ passed += $1; failed += $3; skipped += $5 } END { print passed " passed, " failed " failed, " skipped " skipped" }' \
  <<<"$counts"
exit "$code"
