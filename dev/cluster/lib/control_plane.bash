# etcd, API server, controllers and scheduler. They run twice on demand: below the whole cluster, and on their own,
# with other ports and other state, for tests that play the part of the kubelet.

ports() { # whole | alone
  case $1 in
    whole) ETCD=2379 ETCD_PEER=2380 API=6443 CONTROLLERS=10257 SCHEDULER=10259 ;;
    alone) ETCD=12379 ETCD_PEER=12380 API=16443 CONTROLLERS=20257 SCHEDULER=20259 ;;
  esac
}

api() { curl -sf --cacert "$H/pki/ca.crt" --cert "$H/pki/admin.crt" --key "$H/pki/admin.key" "https://127.0.0.1:$API$1"; }

certificate() { # NAME SUBJECT [ALTERNATIVE NAMES]: signed by the cluster's authority
  local k=$H/pki/$1
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout "$k.key" -out "$k.csr" -subj "$2" 2>/dev/null
  openssl x509 -req -in "$k.csr" -CA "$H/pki/ca.crt" -CAkey "$H/pki/ca.key" -CAcreateserial -days 3650 \
    ${3:+-extfile <(echo "subjectAltName=$3")} -out "$k.crt" 2>/dev/null
}

kubeconfig() { # NAME SUBJECT
  certificate "$1" "$2"
  cat >"$H/$1.kubeconfig" <<YAML
apiVersion: v1
kind: Config
current-context: $CONTEXT
contexts: [{name: $CONTEXT, context: {cluster: $CONTEXT, user: $1}}]
clusters:
- name: $CONTEXT
  cluster: {server: "https://127.0.0.1:$API", certificate-authority-data: $(base64 -w0 "$H/pki/ca.crt")}
users:
- name: $1
  user: {client-certificate-data: $(base64 -w0 "$H/pki/$1.crt"), client-key-data: $(base64 -w0 "$H/pki/$1.key")}
YAML
  chmod 600 "$H/$1.kubeconfig"
}

certificates() {
  [ ! -e "$H/pki/done" ] || return 0
  mkdir -p -m 700 "$H/pki"
  (umask 077; openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 \
    -keyout "$H/pki/ca.key" -out "$H/pki/ca.crt" -subj /CN=localkube-ca 2>/dev/null
    openssl genrsa -out "$H/pki/sa.key" 2048 2>/dev/null)
  certificate apiserver /CN=kube-apiserver \
    "DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,IP:127.0.0.1,IP:$API_IP,IP:$GATEWAY"
  certificate front-proxy /CN=front-proxy
  kubeconfig admin /O=system:masters/CN=admin
  kubeconfig controllers /CN=system:kube-controller-manager
  kubeconfig scheduler /CN=system:kube-scheduler
  kubeconfig proxy /CN=system:kube-proxy
  kubeconfig node "/O=system:nodes/CN=system:node:$NODE"
  touch "$H/pki/done"
}

control_plane() { # OPTION...: more options for the API server
  start etcd etcd --data-dir "$H/etcd" --unsafe-no-fsync --listen-peer-urls http://127.0.0.1:$ETCD_PEER \
    --listen-client-urls http://127.0.0.1:$ETCD --advertise-client-urls http://127.0.0.1:$ETCD \
    --initial-advertise-peer-urls http://127.0.0.1:$ETCD_PEER --initial-cluster default=http://127.0.0.1:$ETCD_PEER
  local k=$H/pki
  start kube-apiserver "$ROOT/bin/kube-apiserver" --etcd-servers=http://127.0.0.1:$ETCD \
    --secure-port=$API --service-cluster-ip-range=$SERVICES \
    --tls-cert-file="$k/apiserver.crt" --tls-private-key-file="$k/apiserver.key" --client-ca-file="$k/ca.crt" \
    --service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$k/sa.key" \
    --service-account-signing-key-file="$k/sa.key" \
    --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged \
    --kubelet-client-certificate="$k/admin.crt" --kubelet-client-key="$k/admin.key" \
    --kubelet-preferred-address-types=InternalIP \
    --requestheader-client-ca-file="$k/ca.crt" --requestheader-allowed-names=front-proxy \
    --requestheader-username-headers=X-Remote-User --requestheader-group-headers=X-Remote-Group \
    --requestheader-extra-headers-prefix=X-Remote-Extra- \
    --proxy-client-cert-file="$k/front-proxy.crt" --proxy-client-key-file="$k/front-proxy.key" "$@"
  await kube-apiserver 60 api /readyz
  say "API server ready"
  start kube-controller-manager "$ROOT/bin/kube-controller-manager" --kubeconfig="$H/controllers.kubeconfig" --leader-elect=false \
    --kube-api-qps=500 --kube-api-burst=1000 --use-service-account-credentials --service-account-private-key-file="$k/sa.key" --root-ca-file="$k/ca.crt" \
    --cluster-signing-cert-file="$k/ca.crt" --cluster-signing-key-file="$k/ca.key" --bind-address=127.0.0.1 --secure-port=$CONTROLLERS
  start kube-scheduler "$ROOT/bin/kube-scheduler" --kubeconfig="$H/scheduler.kubeconfig" --leader-elect=false \
    --bind-address=127.0.0.1 --secure-port=$SCHEDULER
  await kube-controller-manager 60 curl -sfk https://127.0.0.1:$CONTROLLERS/healthz
  await kube-controller-manager 60 api /api/v1/namespaces/default/serviceaccounts/default
  await kube-scheduler 60 curl -sfk https://127.0.0.1:$SCHEDULER/readyz
  say "control plane ready: https://127.0.0.1:$API"
}
