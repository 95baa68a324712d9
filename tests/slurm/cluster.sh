#!/usr/bin/env bash
# The first process of a private SLURM: a login node and NODES compute nodes on this machine, each with a host name and a
# network of its own, so that what only works on one machine fails here as it would on many. cluster.py starts it in
# fresh namespaces (mounts, network, host name, processes), where nothing that it does is seen from outside; the daemons
# and all jobs end with it, and it ends when its standard input does. Says "ready" when all nodes are idle.
#
# usage: cluster.sh FOLDER NODES CPUS     (FOLDER gets the logs; each node claims so many CPUs and two GPUs)
set -euo pipefail
folder=$1 nodes=$2 cpus=$3

mount -t tmpfs tmpfs /run # for sockets, state and named networks
install -d -m 755 /run/munge /run/netns /run/slurm
install -d -m 700 /run/munge/private

hostname login
echo "10.9.0.1 login" >/run/hosts # a node's name is the first of its address: a look-up of the address finds it
for i in $(seq "$nodes"); do echo "10.9.0.$((10 + i)) node$i" >>/run/hosts; done
cat /etc/hosts >>/run/hosts
mount --bind /run/hosts /etc/hosts

ip link set lo up
ip link add bridge type bridge
ip addr add 10.9.0.1/24 dev bridge
ip link set bridge up
for i in $(seq "$nodes"); do
  ip netns add "node$i"
  ip link add "to$i" type veth peer name eth0 netns "node$i"
  ip link set "to$i" master bridge up
  ip -n "node$i" link set lo up
  ip -n "node$i" addr add "10.9.0.$((10 + i))/24" dev eth0
  ip -n "node$i" link set eth0 up
done

(umask 077 && head -c 1024 /dev/urandom >/run/munge/private/key)
munged --key-file=/run/munge/private/key --seed-file=/run/munge/private/seed \
  --socket=/run/munge/socket --pid-file=/run/munge/pid --log-file="$folder/munged.log"

cat >"$SLURM_CONF" <<CONF
ClusterName=kd
SlurmctldHost=login(10.9.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire: a job that is requeued waits for so many seconds, else for two minutes
AuthInfo=socket=/run/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MinJobAge=7200
ReturnToService=2
# a busy machine is not a broken one
MessageTimeout=60
BatchStartTimeout=120
TCPTimeout=30
SlurmdTimeout=300
StateSaveLocation=/run/slurm
SlurmdSpoolDir=/run/slurm/%n
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
SlurmdParameters=config_overrides
$(for i in $(seq "$nodes"); do echo "NodeName=node$i NodeAddr=10.9.0.$((10 + i)) CPUs=$cpus Gres=gpu:2 State=UNKNOWN"; done)
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF State=UP
CONF
touch /run/slurm/gpu0 /run/slurm/gpu1 # GPUs to be counted, not to be used
printf 'AutoDetect=off\nName=gpu File=/run/slurm/gpu[0-1]\n' >/run/slurm/gres.conf
slurmctld
for i in $(seq "$nodes"); do
  # not `ip netns exec`: it mounts a /sys without the control groups that slurmd looks for
  # shellcheck disable=SC2016
  nsenter --net="/run/netns/node$i" unshare --uts bash -c 'hostname "$1" && exec slurmd' bash "node$i"
done

for _ in $(seq 300); do
  idle=$(sinfo --noheader --Node --format=%N,%t 2>/dev/null | sort -u | grep -c ',idle$' || true)
  [[ $idle != "$nodes" ]] || break
  sleep 0.2
done
[[ $idle == "$nodes" ]] || { sinfo --Node --long >&2; tail -n 20 "$folder"/*.log >&2; exit 1; }
echo ready
cat >/dev/null
