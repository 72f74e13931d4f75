#!/usr/bin/env bash
# Runs a command as four MPI processes on two hosts: network namespaces of this machine, joined by a cable of their own.
#   two_hosts.sh SECONDS COMMAND...   after so many seconds the cable is cut; 0: never
# After a cut the processes end, but mpirun waits for its helper on the other host until it is killed: LIMIT=100 s.
# Exit code 77: this machine cannot do that (it takes root, ip, unshare and OpenMPI).
set -u
cut_after=$1
shift
a=microgpt_a_$$ b=microgpt_b_$$ work=$(mktemp -d)
tidy_up() {
  ip netns pids "$b" 2>/dev/null | xargs -r kill -9
  ip netns pids "$a" 2>/dev/null | xargs -r kill -9
  ip netns del "$a" 2>/dev/null
  ip netns del "$b" 2>/dev/null
  rm -rf "$work"
}
trap tidy_up EXIT

command -v unshare >/dev/null && mpirun --version 2>/dev/null | grep -q 'Open MPI' || exit 77
for host in "$a" "$b"; do ip netns add "$host" 2>/dev/null && ip -n "$host" link set lo up || exit 77; done
ip link add plug_a netns "$a" type veth peer name plug_b netns "$b" 2>/dev/null || exit 77
ip -n "$a" addr add 10.77.0.1/24 dev plug_a && ip -n "$a" link set plug_a up || exit 77
ip -n "$b" addr add 10.77.0.2/24 dev plug_b && ip -n "$b" link set plug_b up || exit 77

# mpirun starts its helper on the other host by this, in place of ssh.
cat >"$work/shell" <<END
#!/bin/sh
shift
exec ip netns exec $b unshare --uts sh -c "hostname host-b; \$*"
END
cat >"$work/start" <<'END'
agent=$1
shift
hostname host-a
exec timeout --foreground -k 1 "${LIMIT:-100}" mpirun --mca plm_rsh_agent "$agent" --mca btl tcp,self --mca btl_tcp_if_include 10.77.0.0/24 \
  --mca oob_tcp_if_include 10.77.0.0/24 --host 10.77.0.1:2,10.77.0.2:2 -n 4 "$@"
END
chmod +x "$work/shell"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
ip netns exec "$a" unshare --uts sh "$work/start" "$work/shell" "$@" &
run=$!
if [ "$cut_after" != 0 ]; then
  sleep "$cut_after"
  ip -n "$a" link set plug_a down
fi
wait "$run"
