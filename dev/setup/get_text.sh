#!/bin/sh
# Fetches a text to train on: dev/setup/get_text.sh OUT
# Tiny Shakespeare if its canonical address can be reached; otherwise the King James Bible from the distribution's
# package bible-kjv, so that a machine which reaches only a package mirror has a text as well. What exists is kept.
set -eu

out=${1:?usage: dev/setup/get_text.sh OUT}
url=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
sha256=86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed
last_verse=31102

say() { echo "get_text: $*" >&2; }

if [ -e "$out" ]; then
  say "$out exists: left as it is"
  exit 0
fi
mkdir -p "$(dirname "$out")"
part=$out.part
work=$(mktemp -d)
trap 'rm -rf "$part" "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

download() {
  if command -v curl >/dev/null; then
    curl -fsSL --connect-timeout 10 --max-time 120 -o "$part" "$url"
  elif command -v wget >/dev/null; then
    wget -q --tries=1 --timeout=10 -O "$part" "$url"
  else
    say "neither curl nor wget is installed"
    return 1
  fi
}

checksum() {
  if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

if download; then
  found=$(checksum "$part")
  if [ "$found" = "$sha256" ]; then
    mv "$part" "$out"
    say "$out: Tiny Shakespeare"
    exit 0
  fi
  # Most likely a proxy's own page. We do not use it, and go on as if nothing had come.
  say "ERROR: what came from $url is not Tiny Shakespeare: its sha256 is $found instead of $sha256"
else
  say "could not download $url"
fi

# The program looks for its data in the folder it is started in, then where the package puts it: so the package works
# unpacked too, without root. Otherwise we start it in an empty folder.
cd_to=$work
if command -v bible >/dev/null; then
  bible=bible
elif command -v apt-get >/dev/null &&
  (cd "$work" && apt-get download bible-kjv bible-kjv-text >&2 && for d in *.deb; do dpkg -x "$d" .; done); then
  bible=$work/usr/bin/bible
  cd_to=$work/usr/lib
else
  say "ERROR: no text. Put any UTF-8 text at $out, for example Tiny Shakespeare from $url"
  exit 1
fi

# Ge1:1 In the beginning ...  One verse a line, without its mark; an empty line between chapters.
(cd "$cd_to" && "$bible" -f gen1:1-rev22:21) | awk '
  { split($1, mark, ":"); if (NR > 1 && mark[1] != chapter) print ""; chapter = mark[1]; sub(/^[^ ]* /, ""); print }
' >"$part"
verses=$(grep -c . "$part" || true)
if [ "$verses" -ne "$last_verse" ]; then
  say "ERROR: \`bible\` printed $verses verses instead of $last_verse. Put any UTF-8 text at $out yourself"
  exit 1
fi
mv "$part" "$out"
say "*** $out is the King James Bible, NOT Tiny Shakespeare: figures in the documentation do not apply to it."
say "*** To train on a text of your own, put it at $out (or run ./data_prep my.txt)."
