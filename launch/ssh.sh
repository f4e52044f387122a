#!/usr/bin/env bash
# Runs one command on several hosts as one run, over ssh.
#
#   launch/ssh.sh HOSTS COMMAND [ARGUMENT...]
#   launch/ssh.sh hosts.txt virst train --config=stage3 --workdir=/shared/runs/a --config.distributed=True
#
# HOSTS is a file with one host a line; the first one coordinates. Every host needs the same installation, the same files
# at the same places, and ssh without a password. The command runs in the folder from which this script is called.
# SIGTERM and Ctrl-C go to all hosts, and the script waits until they have written their checkpoint. When one host
# fails, the others end by themselves. The exit status is the first that is not 0.
#
# PORT (1234) is a free port of the first host. SSH (ssh -tt -o BatchMode=yes) is the command that reaches a host. It
# must give the command a terminal.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "launch/ssh.sh: give a file with one host a line, and a command" >&2
  exit 2
fi
if [ ! -r "$1" ]; then
  echo "launch/ssh.sh: $1 cannot be read; write one host a line into it" >&2
  exit 2
fi
mapfile -t hosts < <(grep -vE '^[[:space:]]*(#|$)' "$1" || true)
shift
if [ ${#hosts[@]} -eq 0 ]; then
  echo "launch/ssh.sh: the file names no host; write one a line" >&2
  exit 2
fi
# a terminal on the other side (-tt) turns the character of Ctrl-C into a signal
read -ra ssh <<< "${SSH:-ssh -tt -o BatchMode=yes}"
coordinator="${hosts[0]#*@}:${PORT:-1234}"

pids=()
inputs=()
stopping=no
trap 'stopping=yes; for input in "${inputs[@]}"; do printf "\\003" >&"$input" || true; done' TERM INT

for index in "${!hosts[@]}"; do
  printf -v remote 'cd %q && JAX_COORDINATOR_ADDRESS=%q JAX_NUM_PROCESSES=%q JAX_PROCESS_ID=%q exec' \
    "$PWD" "$coordinator" "${#hosts[@]}" "$index"
  printf -v command ' %q' "$@"
  # a session of its own: Ctrl-C here must not end ssh before the command on the other side has ended
  exec {input}> >(exec setsid --wait "${ssh[@]}" "${hosts[$index]}" "$remote$command")
  pids+=($!)
  inputs+=("$input")
done

status=0
for pid in "${pids[@]}"; do
  while true; do
    code=0
    wait "$pid" || code=$?
    if [ "$stopping" = no ]; then break; fi
    stopping=no # the signal ended the waiting, not the command
  done
  if [ "$status" -eq 0 ]; then
    status=$code
  fi
done
exit "$status"
