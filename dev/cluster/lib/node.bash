# The node: network, registry, containerd, kubelet, proxy, DNS, storage; and what outlives its processes.

bridge() {
  [ -e /sys/class/net/$BRIDGE ] || ip link add $BRIDGE type bridge
  ip addr replace $GATEWAY/24 dev $BRIDGE
  ip link set $BRIDGE up
  ip route replace $SERVICES dev $BRIDGE   # a service address without a rule ends here, never on the uplink
  sysctl -qw net.ipv4.ip_forward=1 net.bridge.bridge-nf-call-iptables=1
}

for_pods() { # NAME PORT: hands what reaches PORT on the bridge to the same port of 127.0.0.1
  start "$1-for-pods" socat TCP-LISTEN:"$2",bind=$GATEWAY,fork,reuseaddr TCP:127.0.0.1:"$2"
}

registry() {
  configure registry "$H/registry.yaml" <<YAML
version: 0.1
log: {level: warn}
storage: {filesystem: {rootdirectory: $H/registry}, delete: {enabled: true}}
http: {addr: $REGISTRY}
YAML
  # Layers of tags that have moved on: gigabytes. Only while nobody pushes.
  alive registry || [ ! -d "$H/registry/docker" ] || docker-registry garbage-collect --delete-untagged "$H/registry.yaml" >"$H/log/collect.log" 2>&1 ||
    say "the registry keeps what it no longer needs: $H/log/collect.log"
  start registry docker-registry serve "$H/registry.yaml"
  for_pods registry "${REGISTRY##*:}"
  await registry 20 curl -sf http://$REGISTRY/v2/
  local name=${PAUSE#*/}
  if ! curl -sf -o /dev/null -H 'Accept: application/vnd.oci.image.manifest.v1+json' "http://$REGISTRY/v2/${name%:*}/manifests/${name##*:}"; then
    buildah bud -q -t "localhost/$name" "$PAUSE_DIR" >/dev/null
    buildah push -q --tls-verify=false "localhost/$name" "docker://$REGISTRY/$name"
  fi
  say "registry ready: localhost:5000"
}

runtime() {
  mkdir -p "$H/containerd/certs.d/localhost:5000" "$H/cni" $RUN
  printf '[host."http://%s"]\n  capabilities = ["pull", "resolve"]\n' $REGISTRY >"$H/containerd/certs.d/localhost:5000/hosts.toml"
  configure containerd "$H/containerd/config.toml" <<TOML
version = 2
root = "$H/containerd/root"
state = "$RUN/containerd"
oom_score = 0
[grpc]
  address = "$RUN/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "$PAUSE"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$H/cni"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "$H/containerd/certs.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    discard_unpacked_layers = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
TOML
  cat >"$H/cni/10-localkube.conflist" <<JSON
{"cniVersion": "0.4.0", "name": "localkube", "plugins": [
  {"type": "bridge", "bridge": "$BRIDGE", "isGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "$RUN/ipam", "ranges": [[{"subnet": "$PODS"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
JSON
  start containerd containerd --config "$H/containerd/config.toml"
  await containerd 30 "$ROOT/bin/localkube" cri $CRI ps
  say "containerd ready: $CRI"
}

kubelet() {
  echo "nameserver $GATEWAY" >"$H/resolv.conf"
  configure kubelet "$H/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $H/pki/ca.crt}}
authorization: {mode: Webhook}
containerRuntimeEndpoint: $CRI
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
enforceNodeAllocatable: []
clusterDNS: [$DNS_IP]
clusterDomain: cluster.local
resolvConf: $H/resolv.conf
podLogsDir: $H/log/pods
serializeImagePulls: false
registryPullQPS: 0
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 100Mi, nodefs.available: "0%", imagefs.available: "0%"}
nodeStatusReportFrequency: 30s
YAML
  start kubelet "$ROOT/bin/kubelet" --config="$H/kubelet.yaml" --kubeconfig="$H/node.kubeconfig" \
    --hostname-override=$NODE --node-ip=$GATEWAY --root-dir="$H/kubelet" --cert-dir="$H/kubelet/pki"
}

proxy() {
  configure kube-proxy "$H/proxy.yaml" <<YAML
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: $H/proxy.kubeconfig}
clusterCIDR: $PODS
mode: iptables
hostnameOverride: $NODE
conntrack: {maxPerCore: 0, min: 0}
iptables: {minSyncPeriod: 100ms}
YAML
  start kube-proxy "$ROOT/bin/kube-proxy" --config="$H/proxy.yaml"
}

dns() {
  configure coredns "$H/Corefile" <<TEXT
.:53 {
    bind $GATEWAY
    errors
    kubernetes cluster.local in-addr.arpa {
        kubeconfig $H/admin.kubeconfig $CONTEXT
    }
    cache 5
}
TEXT
  start coredns "$ROOT/bin/coredns" -conf "$H/Corefile"
}

node() {
  kubelet
  proxy
  dns
  mkdir -p "$H/volumes"
  start provisioner "$ROOT/bin/provisioner" "$H/admin.kubeconfig" "$H/volumes"
  sed -e "s/GATEWAY/$GATEWAY/; s/DNS_IP/$DNS_IP/" "$HERE/system.yaml" | kubectl apply --server-side --force-conflicts -f - >/dev/null
  await kubelet 90 node_ready
  say "node ready"
  await coredns 60 "$ROOT/bin/localkube" lookup $DNS_IP:53 kubernetes.default.svc.cluster.local
  say "DNS answers at $DNS_IP"
}

node_ready() { # and reported so by this kubelet, not by the one before
  local t; t=$(kubectl get node $NODE -o jsonpath='{range .status.conditions[?(@.type=="Ready")]}{.status}{.lastHeartbeatTime}{end}')
  [[ $t == True* && ! ${t#True} < $(date -u -r "$H/run/kubelet" +%FT%TZ) ]]
}

selftest() { # a pod that runs with a volume of the default storage class
  kubectl -n kube-system delete pod/selftest pvc/selftest --ignore-not-found >/dev/null
  sed "s#PAUSE#$PAUSE#" "$HERE/selftest.yaml" | kubectl apply -f - >/dev/null
  kubectl -n kube-system wait --for=condition=Ready pod/selftest --timeout=60s >/dev/null ||
    fail "no pod with a volume starts: kubectl -n kube-system describe pod/selftest pvc/selftest"
  kubectl -n kube-system delete pod/selftest pvc/selftest --wait=false >/dev/null
  say "a pod with a volume of the default storage class runs"
}

stop_pods() {
  alive containerd || return 0
  "$ROOT/bin/localkube" cri $CRI stop >/dev/null 2>"$H/log/stop.log" || say "some pods did not stop in order: $H/log/stop.log"
}

leftovers() { # what outlives the processes
  local p n m save c
  # containers whose runtime died before them: their shims name our socket
  for p in /proc/[0-9]*; do
    [[ $(readlink "$p/exe") == */containerd-shim-runc-v2 ]] &&
      tr '\0' ' ' <"$p/cmdline" | grep -qF -- "-address $RUN/containerd.sock" || continue
    kill -9 $(cat "$p"/task/*/children) "${p#/proc/}" 2>/dev/null || true
  done
  for n in $(grep -ohsE '/run/netns/cni-[0-9a-f-]+' $RUN/containerd/io.containerd.runtime.v2.task/k8s.io/*/config.json | sort -u); do
    ip netns delete "${n##*/}" 2>/dev/null || true
  done
  while read -r m; do umount -l "$m" || true; done < <(cut -d' ' -f2 /proc/self/mounts | grep -E "^($H|$RUN)/" | tac)
  rm -rf $RUN
  [ ! -e /sys/class/net/$BRIDGE ] || ip link delete $BRIDGE
  for save in iptables ip6tables; do
    if [ "$($save-save 2>/dev/null | grep -cE 'KUBE-|CNI-')" != 0 ]; then
      $save-save 2>/dev/null | grep -vE 'KUBE-|CNI-' | $save-restore || say "$save rules were left"
    fi
  done
  for c in /sys/fs/cgroup/{,*/}kubepods; do
    [ ! -d "$c" ] || find "$c" -depth -type d -exec rmdir {} + 2>/dev/null || true
  done
  # kubelet and the network plugins write here whatever they are told
  rm -f /var/lib/kubelet/device-plugins/kubelet.sock
  find /var/log/containers -maxdepth 1 -xtype l -delete 2>/dev/null || true
  find /var/log/containers /var/lib/cni /var/lib/kubelet -depth -type d -empty -delete 2>/dev/null || true
}
