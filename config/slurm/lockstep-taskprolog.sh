#!/bin/bash -p
# Slurm's TaskProlog (the job's user, before each task and each batch script): the task is started only on data that is good.
#
#   LOCKSTEP_CHECK          the paths, separated by colons; or one a line, then a path may have colons
#   LOCKSTEP_CHECK_OPTIONS  options of 'lockstep check', separated by blanks: --quick, --max-age 7d, --timeout 600
#
# Without LOCKSTEP_CHECK nothing is checked. Where root's Prolog has a list of paths, its answer has to be good as well.
# What is wrong is printed to the job's output, and this ends with 1, so that Slurm does not start the task.

PATH=/usr/bin:/bin
lockstep=/usr/bin/lockstep
# As in lockstep-prolog.sh.
list=/etc/lockstep/slurm-paths
answers=/run/lockstep-slurm
# How much of what a check says is shown: so many findings of each path, and so many bytes of a line.
findings=3
width=1000

# Slurm carries out what it reads from here: 'export', 'unset' and 'print' at the beginning of a line. Nothing but tell() writes.
exec 3>&1 </dev/null >/dev/null 2>&1

tell() {
    local line
    while IFS= read -r line; do printf 'print %s\n' "${line:0:$width}" >&3; done <<<"$1"
}

refuse() {
    tell "lockstep: not started on ${SLURMD_NODENAME:-this node}, because its data is not known to be good:"
    tell "$1"
    exit 1
}

# Names the step by its slurmstepd, the parent of the task whose child this is: another start of the same job has another one.
step() {
    local stat
    stat=$(<"/proc/$PPID/stat") && set -- ${stat##*) } && local daemon=$2 || return
    stat=$(<"/proc/$daemon/stat") && set -- ${stat##*) } || return
    echo "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.${SLURM_STEP_ID:-batch}.$daemon.${20}"
}

# Checks all paths; 'answer' is 'good', or what is wrong. It is good only where each check ended with 0 and said so.
check() {
    local path said code bad=
    answer=
    for path in "${paths[@]}"; do
        [ -n "$path" ] || continue
        # Slurm reads to the end of 3, and the lock is held until the end of 9: a check that outlives this script has neither.
        # What it says is asked for as well: where no pipe can be made, nothing is run and nothing fails.
        said=
        code=126
        said=$(exec 2>&1 3>&- 9>&-; exec "$lockstep" check "${options[@]}" -- "$path") && code=0 || code=$?
        [ "$code" = 0 ] && [[ $said == *": good, "* ]] && continue
        bad=1
        [ -n "$said" ] || said="lockstep: ${path@Q}: the check said nothing (exit code $code); check it by hand"
        if [ "$(wc -l <<<"$said")" -gt $((findings + 1)) ]; then
            # The last line is the summary: how much of what was found, and what to do.
            said="$(head -n "$findings" <<<"$said")"$'\n...\n'"$(tail -n 1 <<<"$said")"
        fi
        case $code in
            [1-5] | 75) ;;
            0) ;;
            *)
                said+="${said:+$'\n'}lockstep: ${path@Q}: the check was killed or could not be started (exit code $code); "
                said+="nothing is known of it, so check it again"
                ;;
        esac
        answer+="$said"$'\n'
    done
    answer=${answer%$'\n'}
    [ -n "$bad" ] || answer=good
}

# Whether there is a list cannot be seen from outside of a closed directory: then the Prolog's answer counts, as where there is one.
if [ -e "$list" ] || { [ -d "${list%/*}" ] && ! [ -x "${list%/*}" ]; }; then
    found=$(<"$answers/$SLURM_JOB_ID")
    [ "$found" = good ] || refuse "${found:-lockstep: the Prolog left no answer; tell the administrator of this node}"
fi
[ -n "${LOCKSTEP_CHECK:-}" ] || exit 0

set -f
options=(${LOCKSTEP_CHECK_OPTIONS:-})
case $LOCKSTEP_CHECK in *$'\n'*) IFS=$'\n' ;; *) IFS=: ;; esac
paths=($LOCKSTEP_CHECK)
IFS=$' \t\n'
[ -n "${paths[*]// /}" ] || refuse "lockstep: LOCKSTEP_CHECK is set, and names no path"
for option in "${options[@]}"; do
    # They would end with 0 without a check, or say it in a way that is not read here.
    case $option in -[!-]*h* | -h | --help | --json) refuse "lockstep: LOCKSTEP_CHECK_OPTIONS: '$option' does not belong there" ;; esac
done

# One task of a step on a node checks, the others wait and take its answer from a directory that only this user can write to.
# Where there is none, each task checks for itself.
shared=/tmp/lockstep-$UID
mkdir -m 700 "$shared"
name=$(step)
if [ -n "$name" ] && [ -d "$shared" ] && [ ! -L "$shared" ] && [ -O "$shared" ] && exec 9<>"$shared/$name"; then
    find "$shared" -type f -mtime +1 -delete
    flock 9
    answer=$(cat <&9)
    if [ -n "$answer" ]; then
        [ "$answer" = good ] || refuse "lockstep: another task of this node found it bad and says what is wrong"
        exit 0
    fi
    check
    printf '%s' "$answer" >&9
else
    check
fi
[ "$answer" = good ] || refuse "$answer"
exit 0
