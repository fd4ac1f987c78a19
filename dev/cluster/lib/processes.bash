# Host processes of the cluster: one pid file each in $H/run, holding the pid and its start time.

birth() { # PID: its start time, unless it is gone or a zombie
  local s; s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  s=${s##*) }; set -- $s
  [ "$1" != Z ] && echo "${20}"
}

alive() { # NAME: sets PID
  local born
  read -r PID born 2>/dev/null <"$H/run/$1" && [ "$(birth "$PID")" = "$born" ]
}

start() { # NAME COMMAND...
  local name=$1; shift
  alive "$name" && return
  [ ! -e "$H/log/$name.log" ] || mv "$H/log/$name.log" "$H/log/$name.log.1"
  setsid nohup "$@" >"$H/log/$name.log" 2>&1 </dev/null 9>&- & # 9: the lock of the command that starts it
  echo "$! $(birth $!)" >"$H/run/$name"
}

configure() { # NAME FILE: standard input into FILE; where that changes it, NAME is stopped, to be started anew
  local content; content=$(cat)
  # Never written for nothing: kube-proxy ends when its file is touched.
  [ "$(cat "$2" 2>/dev/null)" != "$content" ] || return 0
  stop "$1"
  printf '%s\n' "$content" >"$2"
}

stop() { # NAME...: TERM, and KILL after GRACE seconds
  local name i=0
  for name; do if alive "$name"; then kill "$PID"; fi; done
  for name; do
    while alive "$name"; do
      [ $((++i)) -lt $((${GRACE:-10} * 20)) ] || kill -9 "$PID"
      sleep 0.05
    done
    rm -f "$H/run/$name"
  done
}

await() { # NAME SECONDS COMMAND...: until COMMAND succeeds, while the process NAME lives
  local name=$1 end=$(($(date +%s) + $2)); shift 2
  until "$@" >/dev/null 2>&1; do
    if ! alive "$name"; then
      tail -n 8 "$H/log/$name.log" >&2
      fail "$name ended; its log is $H/log/$name.log"
    fi
    [ "$(date +%s)" -lt $end ] || fail "$name is not ready: '$*' does not succeed; its log is $H/log/$name.log"
    sleep 0.1
  done
}
