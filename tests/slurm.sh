#!/usr/bin/env bash
# A throw-away Slurm on loopback, for the tests and for trying things out: six nodes of one core each,
# all of them this machine.
#
#   tests/slurm.sh install         Debian's packages, where Slurm is not found; needs root
#   tests/slurm.sh start FOLDER    make it there and start it; prints its SLURM_CONF
#   tests/slurm.sh stop FOLDER     cancel its jobs and stop it
#
# All users must be able to pass through FOLDER, or munge refuses to keep its socket there. Keeps no
# accounts (sacct knows nothing) and holds no job to its memory. Exit code 3: no Slurm is here, or it does
# not start.
set -euo pipefail
export PATH=$PATH:/usr/sbin

here() { command -v slurmctld && command -v slurmd && command -v sbatch && command -v munged; } >/dev/null

install() {
    if here; then return; fi
    if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
        echo "Slurm is not installed; as root on Debian this script installs it" >&2
        return 3
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >/dev/null
    apt-get install -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null
    here
}

start() {
    here || { echo "no Slurm is here" >&2; return 3; }
    local host user ports node
    folder=$1
    trap 'stop "$folder"; exit 3' EXIT # until all runs
    host=$(hostname -s) user=$(id -un)
    mkdir -p "$folder/state"
    read -ra ports < <(python3 -c '
import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(7)]
print(*(s.getsockname()[1] for s in held))')
    (umask 077 && head -c 128 /dev/urandom >"$folder/key")
    munged --socket "$folder/munge" --key-file "$folder/key" --pid-file "$folder/munged.pid" \
        --log-file "$folder/munged.log" --seed-file "$folder/seed"
    {
        cat <<CONF
ClusterName=nasattn
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$folder/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
PartitionName=main Nodes=ALL Default=YES State=UP
CONF
        for node in 1 2 3 4 5 6; do
            mkdir -p "$folder/n$node"
            echo "NodeName=n$node NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[$node]} CPUs=1 RealMemory=2000"
        done
    } >"$folder/slurm.conf"
    export SLURM_CONF=$folder/slurm.conf
    slurmctld
    for node in 1 2 3 4 5 6; do slurmd -N "n$node"; done
    srun --quiet --nodes 6 --immediate=60 true || { tail -n 20 "$folder"/*.log >&2; return 3; }
    trap - EXIT
    echo "$SLURM_CONF"
}

stop() {
    export SLURM_CONF=$1/slurm.conf
    [ ! -e "$SLURM_CONF" ] || scancel --user "$(id -u)" || true
    local file
    for file in "$1"/n?.pid "$1/slurmctld.pid" "$1/munged.pid"; do
        [ ! -e "$file" ] || kill -KILL "$(cat "$file")" || true
    done
}

case "${1-} $#" in
    "install 1") install ;;
    "start 2" | "stop 2") "$1" "$(realpath -m "$2")" ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
