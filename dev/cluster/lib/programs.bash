# What must be there before anything starts: Debian packages, and programs built from Go modules into $ROOT/build.

KUBE_VERSION=v1.34.4 # the same as in localkube/go.mod
HELM_VERSION=v3.22.0
PACKAGES=(containerd runc buildah etcd-server iproute2 iptables containernetworking-plugins
  conntrack ethtool socat docker-registry openssl curl mmdebstrap prometheus)
PROGRAMS=(localkube kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy coredns provisioner kubectl)

packages() {
  local p missing=() policy=/usr/sbin/policy-rc.d
  for p in "${PACKAGES[@]}"; do
    [ "$(dpkg-query -Wf '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
  done
  [ ${#missing[@]} != 0 ] || return 0
  say "installing ${missing[*]}"
  # Debian starts the services it installs; they would take the ports used here.
  if [ -e $policy ]; then policy=; else printf '#!/bin/sh\nexit 101\n' >$policy; chmod +x $policy; fi
  local rc=0
  export DEBIAN_FRONTEND=noninteractive
  { apt-get install -y --no-install-recommends "${missing[@]}" ||
    { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; }; } >"$ROOT/log/apt.log" 2>&1 || rc=$?
  [ -z "$policy" ] || rm -f "$policy"
  [ $rc = 0 ] || fail "apt-get failed, see $ROOT/log/apt.log"
}

minor() { cut -d. -f2 <<<$KUBE_VERSION; }

build() { # $ROOT/bin/*, built once for each content of the sources; sets PAUSE, PAUSE_DIR
  local sum dir program
  sum=$(cat "$HERE"/localkube/{go.mod,go.sum,*.go} "$HERE"/pause/{go.mod,main.go,Dockerfile} | sha256sum | cut -c1-12)
  dir=$ROOT/build/$sum
  [ -e "$dir/done" ] || build_kubernetes "$dir"
  for program in "${PROGRAMS[@]}"; do
    ln -sfn "$dir/localkube" "$ROOT/bin/$program"
  done
  PAUSE=localhost:5000/localkube/pause:$sum PAUSE_DIR=$dir
}

build_kubernetes() { # DIRECTORY
  local dir=$1 flags="-s -w" p
  command -v go >/dev/null || fail "go is not on the PATH"
  say "building Kubernetes $KUBE_VERSION and CoreDNS (about 6 minutes, unless Go has it cached)"
  # Without a version that parses, clients refuse to talk to the server.
  for p in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
    flags+=" -X $p.gitVersion=$KUBE_VERSION -X $p.gitMajor=1 -X $p.gitMinor=$(minor) -X $p.gitTreeState=clean"
  done
  mkdir -p "$dir"
  (cd "$HERE/localkube" && go build -ldflags "$flags" -o "$dir/localkube" .) 2>"$ROOT/log/go.log" ||
    { tail -n 20 "$ROOT/log/go.log" >&2; fail "Kubernetes did not build, see $ROOT/log/go.log"; }
  (cd "$HERE/pause" && CGO_ENABLED=0 go build -ldflags "-s -w" -o "$dir/pause" .)
  cp "$HERE/pause/Dockerfile" "$dir"
  touch "$dir/done"
}

build_helm() {
  local dir=$ROOT/build/helm-$HELM_VERSION module=helm.sh/helm/v3
  if [ ! -x "$dir/helm" ]; then
    command -v go >/dev/null || fail "go is not on the PATH"
    say "building Helm $HELM_VERSION (1 to 4 minutes)"
    # The version of Kubernetes is what `helm template` and `helm lint` assume.
    local flags="-s -w -X $module/internal/version.version=$HELM_VERSION" p
    for p in chartutil lint/rules; do
      flags+=" -X $module/pkg/$p.k8sVersionMajor=1 -X $module/pkg/$p.k8sVersionMinor=$(minor)"
    done
    mkdir -p "$dir"
    GOBIN=$dir go install -ldflags "$flags" $module/cmd/helm@$HELM_VERSION 2>"$ROOT/log/go-helm.log" ||
      { tail -n 20 "$ROOT/log/go-helm.log" >&2; fail "Helm did not build, see $ROOT/log/go-helm.log"; }
  fi
  ln -sfn "$dir/helm" "$ROOT/bin/helm"
}
