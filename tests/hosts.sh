#!/bin/bash
# Hosts on one machine: hosts.sh FOLDER NAME=ADDRESS ... (run by tests/hosts.py under `unshare -mnpf --mount-proc`).
# Each has its own network, host name, /etc/hosts and /dev/shm. FOLDER/NAME.pid is the process that holds a host.
set -eu
folder=$1
shift
mount --make-rprivate /
ip link set lo up
ip link add br0 type bridge
ip link set br0 up
ip addr add 10.9.0.254/24 dev br0
for host in "$@"; do
    name=${host%=*} address=${host#*=}
    # As Debian has it: a host's own name is that of an address which no other host reaches.
    printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$name" >"$folder/$name.hosts"
    unshare -mnu bash -c "
        hostname $name
        mount -t tmpfs -o size=1500m tmpfs /dev/shm
        mount --bind $folder/$name.hosts /etc/hosts
        touch $folder/$name.up
        exec sleep infinity" &
    pid=$!
    until [ -e "$folder/$name.up" ]; do sleep 0.05; done
    ip link add "v-$name" type veth peer name eth0 netns $pid
    ip link set "v-$name" master br0 up
    nsenter -t $pid -n ip link set lo up
    nsenter -t $pid -n ip link set eth0 up
    nsenter -t $pid -n ip addr add "$address/24" dev eth0
    nsenter -t $pid -n ip route add default via 10.9.0.254
    echo $pid >"$folder/$name.pid"
done
touch "$folder/ready"
exec sleep infinity
