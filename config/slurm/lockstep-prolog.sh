#!/bin/bash -p
# Slurm's Prolog (root, once for each job on a node): whether what every job of this node needs was found good by an earlier
# 'lockstep check'. Reads verdicts, hashes nothing. Leaves its answer for lockstep-taskprolog.sh, which starts no task without a
# good one. Always ends with 0: a Prolog that fails drains the node, and bad data is no fault of the node.

PATH=/usr/bin:/bin # slurmd gives none
lockstep=/usr/bin/lockstep
# One path a line; empty lines and those that begin with '#' are left out. Without this file nothing is asked for.
list=/etc/lockstep/slurm-paths
# What 'lockstep check' gets besides: how old a verdict may be, and maybe --require-signature, --as or --verdict.
options=(--max-age 1d)
# Where the answers lie, by the job's number. Only root may write there.
answers=/run/lockstep-slurm
# All paths together get so many seconds. Less than BatchStartTimeout.
limit=8

exec </dev/null >/dev/null 2>&1
[ -e "$list" ] || exit 0
umask 022
answer=$answers/$SLURM_JOB_ID
mkdir -p "$answers"
# A job that is requeued keeps its number: the answer of before must not stand for this start.
rm -f "$answer"

wrong=
# mapfile takes a read that fails for the end of the list.
text=$(cat -- "$list") || wrong="lockstep: '$list' cannot be read on this node"$'\n'
mapfile -t paths <<<"$text" || wrong+="lockstep: the paths in '$list' cannot be taken apart"$'\n'
for path in "${paths[@]}"; do
    case $path in '' | '#'*) continue ;; esac
    late="lockstep: ${path@Q} was not looked at within $limit seconds; its storage is slow, or does not answer"
    left=$((limit - SECONDS))
    if [ "$left" -lt 1 ]; then
        wrong+=$late$'\n'
        continue
    fi
    # What it says is asked for as well: where no pipe can be made, nothing is run and nothing fails.
    said=
    code=126
    said=$(timeout -k 1 "$left" "$lockstep" check --cached "${options[@]}" -- "$path" 2>&1) && code=0 || code=$?
    [ "$code" = 0 ] && [[ $said == *": good, "* ]] && continue
    case $code in 124 | 137) said=$late ;; esac
    wrong+="${said:-lockstep: ${path@Q}: the check ended with $code and said nothing}"$'\n'
done

# Whole or not at all: what is not there counts as bad.
printf '%s' "${wrong:-good}" >"$answer.new" && mv -f "$answer.new" "$answer"
exit 0
