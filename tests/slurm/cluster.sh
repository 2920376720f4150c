#!/usr/bin/env bash
# A real SLURM on this machine, run as root: one node that says it has 16 cores, 64 GB and one GPU, in partitions "gpu" and "cpu".
# It says "ready", and is stopped by the end of its standard input. Status 3: there can be no cluster here, and why.
set -eu
export DEBIAN_FRONTEND=noninteractive
PATH=$PATH:/usr/sbin:/sbin # where daemons are; not every shell looks there

settings=/etc/slurm # where every command looks
name=hfprune-test
folder=$(mktemp -d)
host=$(hostname -s)

refuse() {
  echo "$1"
  rm -rf "$folder"
  exit 3
}

install() {
  timeout 120 apt-get update -qq &&
    timeout 240 apt-get install -y -qq --no-install-recommends slurm-wlm slurm-wlm-basic-plugins munge
}

stop() {
  { scontrol update NodeName="$host" State=DRAIN Reason=stop && scancel --user root; } 2> /dev/null || true
  for _ in $(seq 40); do # until what runs has ended
    if [ -z "$(squeue --noheader --states RUNNING,COMPLETING 2> /dev/null)" ]; then break; fi
    sleep 0.5
  done
  kill $(jobs -p) 2> /dev/null || true
  wait
  rm -rf "$folder" "$settings"/{slurm,gres}.conf
}

exec 9> "/tmp/$name.lock" # one at a time, whoever tests
flock --wait 600 9 || refuse "another test cluster runs here"
if ! command -v slurmctld slurmd munged > "$folder/found" && ! install > "$folder/apt.log" 2>&1; then
  refuse "slurm-wlm could not be installed: $(tail -n 1 "$folder/apt.log")"
fi
if [ -e $settings/slurm.conf ] && ! grep -q "ClusterName=$name" $settings/slurm.conf; then
  refuse "this machine is part of a cluster"
fi
trap stop EXIT

mkdir -p $settings
cat > $settings/slurm.conf << CONF
ClusterName=$name
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
MinJobAge=3600
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
NodeName=$host NodeAddr=127.0.0.1 CPUs=16 RealMemory=64000 Gres=gpu:1 State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES State=UP
PartitionName=cpu Nodes=ALL State=UP
CONF
echo "NodeName=$host Name=gpu File=/dev/null" > $settings/gres.conf
mkdir "$folder"/{state,spool,munge}
chmod 755 "$folder"
chown munge: "$folder/munge"

munge=$folder/munge
runuser -u munge -- munged --foreground --socket "$munge/socket" --pid-file "$munge/pid" --seed-file "$munge/seed" \
  > "$folder/munged.out" 2>&1 9>&- &
slurmctld -D > "$folder/slurmctld.out" 2>&1 9>&- &
slurmd -D > "$folder/slurmd.out" 2>&1 9>&- &
for _ in $(seq 60); do
  if [ "$(jobs -pr | wc -l)" -lt 3 ]; then break; fi # sinfo would wait long for a daemon that has ended
  if sinfo --noheader --format %T 2> "$folder/sinfo.log" | grep -q idle; then
    echo ready
    cat > /dev/null
    exit
  fi
  sleep 0.5
done
refuse "SLURM does not start here: $(tail -q -n 1 "$folder"/*.{log,out} | tr '\n' ' ')"
