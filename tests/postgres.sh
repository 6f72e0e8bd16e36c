#!/usr/bin/env bash
# A throw-away PostgreSQL on loopback, for the tests and for trying things out.
#
#   tests/postgres.sh install         Debian's packages, where no server program is found; needs root
#   tests/postgres.sh start FOLDER    make it there (once), start it, print its URL
#   tests/postgres.sh stop FOLDER     stop it; what it holds stays, `start` goes on at the same URL
#
# The server's user must be able to reach FOLDER: that of root is `postgres`, which PostgreSQL asks
# for. Exit code 3: no server program is here.
set -euo pipefail

programs() { # the folder of initdb and pg_ctl: the newest of Debian's, else what PATH has
    local folder
    folder=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -n 1)
    [ -x "$folder/pg_ctl" ] || folder=$(dirname "$(command -v pg_ctl || echo none/none)")
    [ -x "$folder/initdb" ] && echo "$folder"
}

install() {
    if programs >/dev/null; then return; fi
    if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
        echo "PostgreSQL is not installed; as root on Debian this script installs it" >&2
        return 3
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >/dev/null
    apt-get install -qq --no-install-recommends postgresql >/dev/null
    programs >/dev/null
}

as_user() { # PostgreSQL refuses to run as root
    if [ "$(id -u)" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi
}

start() {
    local folder=$1 bin port
    bin=$(programs) || { echo "no PostgreSQL server program is here" >&2; return 3; }
    if [ ! -e "$folder/url" ]; then
        mkdir -p "$folder"
        chmod 700 "$folder" # the password stands there
        [ "$(id -u)" != 0 ] || chown postgres "$folder"
        python3 -c 'import secrets; print(secrets.token_hex(16))' >"$folder/password"
        [ "$(id -u)" != 0 ] || chown postgres "$folder/password"
        as_user "$bin/initdb" --pgdata "$folder/data" --username nasattn --encoding UTF8 \
            --locale C --auth scram-sha-256 --pwfile "$folder/password" --no-sync >/dev/null
        port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
        as_user tee -a "$folder/data/postgresql.conf" >/dev/null <<CONF
listen_addresses = '127.0.0.1'
port = $port
unix_socket_directories = ''
CONF
        echo "postgresql://nasattn:$(cat "$folder/password")@127.0.0.1:$port/postgres" >"$folder/url"
    fi
    as_user "$bin/pg_ctl" --pgdata "$folder/data" --log "$folder/data/log" --wait --silent start ||
        { cat "$folder/data/log" >&2; return 1; }
    cat "$folder/url"
}

stop() { # sessions that are open are cut off
    as_user "$(programs)/pg_ctl" --pgdata "$1/data" --wait --silent --mode fast stop
}

case "${1-} $#" in
    "install 1") install ;;
    "start 2" | "stop 2")
        folder=$(realpath -m "$2")
        cd / # where the server's user may not be allowed to stand
        "$1" "$folder"
        ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
