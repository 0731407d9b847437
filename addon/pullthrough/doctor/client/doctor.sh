#!/bin/sh
# Find out why the Ollama of this machine does not pull through an ollama-cache, and name the command that mends it.
# Nothing is changed.
#
#   curl -fsS http://CACHE:@@{port}/doctor.sh | sh
#
# Without root the settings of the service stand for the environment of a daemon that belongs to another user. A process
# of a user who is none of `trusted` below is never taken for the daemon, whatever it is called: it could say anything.
# With --fields each finding is one line: yes or no for a fault that stops it now, what, why and mend, between tabs.
# DOCTOR_ROOT is a folder that stands for / where the daemon's files are read.
set -u
PATH=$PATH:/usr/sbin:/sbin
export LC_ALL=C
# What counts is the daemon's.
unset HTTPS_PROXY https_proxy HTTP_PROXY http_proxy ALL_PROXY all_proxy NO_PROXY no_proxy

hosts='@@{hosts}' # the registry first
plain_port='@@{port}'
first_past='@@{first}' last_past='@@{last}' # the versions of Ollama that download past every proxy
patience=5                                  # seconds for a connection
limit=$((3 * patience))                     # seconds for any program that is run
drop_ins=/etc/systemd/system/ollama.service.d
# Where scripts and people add certificates, and where Go looks for the system's list (crypto/x509/root_linux.go).
anchors='/usr/local/share/ca-certificates /etc/pki/ca-trust/source/anchors /etc/pki/trust/anchors
/etc/ca-certificates/trust-source/anchors'
lists='/etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/ca-bundle.pem /etc/pki/tls/cacert.pem
/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem /etc/ssl/cert.pem'
connect="run here the line that 'ollama-cache connect' prints on the cache's machine"
past_proxy='upgrade Ollama, make the cache the gateway of this machine (--mode transparent@8081), or pull from its port @@{port}: ollama pull --insecure http://CACHE:@@{port}/NAMESPACE/MODEL'

registry=${hosts%% *}
faults=0 notes=0 fields='' proxy='' root=${DOCTOR_ROOT-}

# found WHAT WHY MEND: a fault that stops pulls by the cache now. noted: one that does not.
found() {
    faults=$((faults + 1))
    tell yes "$@"
}
noted() {
    notes=$((notes + 1))
    tell no "$@"
}
tell() {
    # What others have written, as an environment or a server's answer, could steer a terminal otherwise.
    for field in "$@"; do
        shift
        set -- "$@" "$(printf %s "$field" | tr -d '\000-\037\177')"
    done
    if [ -n "$fields" ]; then
        printf '%s\t%s\t%s\t%s\n' "$@"
    else
        printf '%s: %s\n    %s\n' "$2" "$3" "$4"
    fi
}
# quoted TEXT: as one word for a shell, in quotes where it needs them.
quoted() {
    case $1 in
        *[!A-Za-z0-9_./:@%+,=-]* | '') printf "'%s'" "$(printf %s "$1" | sed "s/'/'\\\\''/g")" ;;
        *) printf %s "$1" ;;
    esac
}
finish() {
    [ -n "$fields" ] || [ $((faults + notes)) -gt 0 ] || echo "nothing is wrong"
    [ "$faults" -eq 0 ]
    exit
}

# limited COMMAND: an end for what a file, a disk or a server could hold up for ever.
if timeout 1 true 2>/dev/null; then
    limited() { timeout "$limit" "$@"; }
elif command -v perl >/dev/null; then
    limited() { perl -e 'alarm shift; exec @ARGV' "$limit" "$@"; }
else
    limited() { "$@"; }
fi
# is_file PATH: whether it is one that we may read. A FIFO in its place would keep its reader waiting.
is_file() { [ -f "$1" ] && [ -r "$1" ]; }

# --- the daemon

# trusted: the users whose processes are believed: root, whoever asks, and those who may be the service's.
trusted() {
    printf '0 '
    id -u
    [ "$(id -u)" -ne 0 ] || case ${SUDO_UID-} in '' | *[!0-9]*) ;; *) echo "$SUDO_UID" ;; esac
    for user in ollama $(limited systemctl show ollama.service --property User --value 2>/dev/null); do
        id -u -- "$user"
    done 2>/dev/null
}

# is_trusted PID: whether it runs for trusted users alone. Its folder in /proc would say root of any that hides itself,
# and of a program with the set-user-ID bit the effective user is not the one who began it.
is_trusted() {
    ids=$(sed -n 's/^Uid:[[:space:]]*//p' "/proc/$1/status")
    [ -n "$ids" ] || return
    for id in $ids; do
        case " $users " in *" $id "*) ;; *) return 1 ;; esac
    done
    # Not to be seen is the program of a process that has nothing else to be seen.
    program=$(readlink "/proc/$1/exe") || return 0
    program=${program%' (deleted)'}
    [ "${program##*/}" = ollama ]
}

# find_daemon: pid, that of the first `ollama serve`, and stranger, one that is not believed; empty where there is none.
find_daemon() {
    pid='' stranger=''
    users=$(trusted | tr '\n' ' ')
    if ! [ -d /proc/self ]; then
        users=$(printf %s "${users% }" | tr ' ' ',')
        pid=$(pgrep -u "$users" -U "$users" -f 'ollama serve' | head -n 1)
        return
    fi
    for folder in /proc/[0-9]*; do
        read -r name <"$folder/comm" || continue
        [ "$name" = ollama ] || continue
        if ! is_trusted "${folder#/proc/}"; then
            stranger=${folder#/proc/}
            continue
        fi
        case " $(limited tr '\0' ' ' <"$folder/cmdline") " in
            *" serve "*)
                pid=${folder#/proc/}
                return
                ;;
        esac
    done 2>/dev/null
}

# environment_of PID: its variables, one in a line; a failure where we may not look.
environment_of() {
    if [ -d /proc/self ]; then
        limited tr '\0' '\n' <"/proc/$1/environ"
    else
        # macOS shows them behind the command.
        ps -Eww -o command= -p "$1" | tr ' ' '\n' | grep '^[A-Za-z_]*='
    fi 2>/dev/null
}

# service: the variables that the service manager would give the daemon.
service() {
    if command -v systemctl >/dev/null; then
        limited systemctl show ollama.service --property Environment --value | tr ' ' '\n' | tr -d '"'
    elif command -v launchctl >/dev/null; then
        for name in HTTPS_PROXY https_proxy HTTP_PROXY NO_PROXY OLLAMA_HOST; do
            value=$(limited launchctl getenv "$name") && [ -n "$value" ] && echo "$name=$value"
        done
    fi 2>/dev/null
}

# variable NAME VARIABLES: its value, in either case, as Go reads those about proxies.
variable() {
    small=$(printf %s "$1" | tr '[:upper:]' '[:lower:]')
    for name in "$1" "$small"; do
        printf '%s\n' "$2" | sed -n "s/^$name=//p" | head -n 1
    done | sed '/^$/d' | head -n 1
}

# age_of PID: for how many seconds it has run.
age_of() {
    ps -o etime= -p "$1" 2>/dev/null | awk '{
        days = split($1, part, "-") > 1 ? part[1] : 0
        count = split(part[days ? 2 : 1], clock, ":")
        for (i = 1; i <= count; i++) seconds = seconds * 60 + clock[i]
    }
    END { print days * 86400 + seconds }'
}

# version_of_daemon: what it says of itself, if it answers.
version_of_daemon() {
    where=$(variable OLLAMA_HOST "$environment")
    where=${where#*://}
    case ${where%/} in
        '' | 0.0.0.0 | '[::]') where=127.0.0.1:11434 ;;
        0.0.0.0:*) where=127.0.0.1:${where##*:} ;;
        *:*) where=${where%/} ;;
        *) where=${where%/}:11434 ;;
    esac
    curl -q -fsS -m "$patience" "http://$where/api/version" 2>/dev/null |
        sed -n 's/.*"version": *"\([^"]*\)".*/\1/p'
}

# is_past VERSION: whether it downloads past every proxy.
is_past() {
    awk -v version="$1" -v first="$first_past" -v last="$last_past" '
        function number(text, part) { split(text, part, /[^0-9]/); return (part[1] * 1000 + part[2]) * 1000 + part[3] }
        BEGIN { exit !(number(first) <= number(version) && number(version) <= number(last)) }'
}

# --- the way

# covers MEMBER HOST: whether this member of NO_PROXY is about the host at port 443, by the rules of Go.
covers() {
    case $1 in
        '*') return ;;
        *:443) set -- "${1%:443}" "$2" ;;
        *:* | */* | '') return 1 ;;
    esac
    set -- "${1#\*}" "$2"
    case $1 in .*) ;; "$2") return ;; *) set -- ".$1" "$2" ;; esac
    case $2 in *"$1") ;; *) return 1 ;; esac
}

# passed: the hosts that NO_PROXY leads past the proxy.
passed() {
    for host in $hosts; do
        printf '%s\n' "$none" | tr ',' '\n' | tr -d ' \t' | tr '[:upper:]' '[:lower:]' | while read -r member; do
            covers "$member" "$host" && echo "$host" && break
        done
    done | tr '\n' ' ' | sed 's/ $//; s/ /, /g'
}

# ask OPTIONS: a question to the registry that changes nothing, with what curl says of the way.
ask() {
    https_proxy=$proxy limited curl -q -sS -v -m "$((2 * patience))" --connect-timeout "$patience" -o /dev/null "$@" \
        "https://$registry/v2/" 2>&1
}
says() { printf '%s\n' "$said" | grep -qi "$1"; }
is_cache() { says '^< cache-status:.*ollama-cache'; }
# problem: what ended it, in curl's words and without a password of the proxy.
problem() { printf '%s\n' "$said" | sed -n "s/^curl: ([0-9]*) //p" | sed "s/[^ '/]*@//g" | head -n 1; }
# comes_directly: whether the registry is the cache without a proxy: at a gateway, or by a hosts entry.
comes_directly() { (proxy='' && said=$(ask -k) && is_cache); }

# trusts: a failure, with the reason, where the daemon's own list does not accept what the cache presents.
trusts() {
    if [ "$(uname)" = Darwin ]; then
        # The system decides, by keychains that curl need not look at.
        chain=$(mktemp)
        ask -k -w '%{certs}' | sed -n '/BEGIN CERT/,/END CERT/p' >"$chain"
        limited security verify-cert -c "$chain" -p ssl -s "$registry" 2>&1
        status=$?
        rm -f "$chain"
        return $status
    fi
    said=$(ask --cacert "$list" --capath "$folders") && return
    problem
    return 1
}

# seconds_ahead: how far this machine's clock is ahead of the cache's, if the cache's plain port tells.
seconds_ahead() {
    [ -n "$plain_port" ] || return
    curl -q -sSI -m "$patience" "http://$cache:$plain_port/ca.crt" 2>/dev/null | tr -d '\r' |
        awk -v now="$(date -u +%s)" 'tolower($1) == "date:" {
            month = (index("JanFebMarAprMayJunJulAugSepOctNovDec", $4) + 2) / 3
            # Days since 1970-03-01 as if years began in March.
            year = $5 - (month < 3); shifted = month + (month < 3 ? 9 : -3)
            days = 365 * year + int(year / 4) - int(year / 100) + int(year / 400) + int((153 * shifted + 2) / 5) + $3 - 719469
            split($6, clock, ":")
            print now - (days * 86400 + clock[1] * 3600 + clock[2] * 60 + clock[3])
            exit
        }'
}

# addresses: those that the system gives the registry's name.
addresses() {
    if command -v getent >/dev/null; then
        limited getent ahosts "$registry" | awk '{ print $1 }'
    elif command -v dscacheutil >/dev/null; then
        limited dscacheutil -q host -a name "$registry" | sed -n 's/^ipv\{0,1\}6\{0,1\}_\{0,1\}address: //p'
    fi 2>/dev/null | sort -u
}
is_private() {
    case $1 in
        10.* | 127.* | 192.168.* | 169.254.* | 172.1[6-9].* | 172.2[0-9].* | 172.3[01].* | ::1 | f[cde]*:*) return 0 ;;
        *) return 1 ;;
    esac
}

has_ipv6() { { ip -6 address || ifconfig; } 2>/dev/null | grep -q 'inet6 [23]'; }

# --- what is wrong

# of_names: whether the registry's name leads to the cache, and nowhere else.
of_names() {
    inside='' outside=''
    for address in $(addresses); do
        if is_private "$address"; then
            inside=$address
        elif [ "${address#*:}" = "$address" ] || has_ipv6; then
            outside=$address
        fi
    done
    [ -n "$inside" ] || return 0
    if [ -n "$outside" ]; then
        found "DNS leads past the cache in part" \
            "$registry is $inside here, but $outside too, and Ollama takes either" \
            "let the DNS server that says $inside answer for A and AAAA alike: the cache's addresses, or none"
    fi
    case $version in
        '' | 0.[0-9].* | 0.[12][0-9].* | 0.3[0-4].*) ;;
        *)
            found "this Ollama refuses a hosts entry" \
                "$registry is $inside here, and Ollama $version takes blobs from public addresses only" \
                "take the entry away, and $connect"
            ;;
    esac
}

# has_drop_in: whether there is one that sets HTTPS_PROXY.
has_drop_in() {
    for file in "$root$drop_ins"/*.conf; do
        is_file "$file" && limited grep -qs 'HTTPS_PROXY=' "$file" && return
    done
    return 1
}

# of_absence: no HTTPS_PROXY, which is right where the cache is the gateway, or the name leads to it.
of_absence() {
    of_names
    if comes_directly; then
        cache=$registry
        of_trust
        return
    fi
    [ "$faults" -eq 0 ] || return
    what="the daemon has no HTTPS_PROXY"
    if [ -n "$(variable HTTPS_PROXY "$configured")" ]; then
        found "$what" "its service is to have it, but the process was started before" "$restart"
    elif has_drop_in; then
        found "$what" "systemd has not loaded what is in $drop_ins" "sudo systemctl daemon-reload && $restart"
    elif [ -n "$(variable HTTP_PROXY "$environment")" ]; then
        found "$what" "HTTP_PROXY does not count for a registry, which is asked by https" "$connect"
    else
        found "$what" "it goes to the registry directly; a variable in your shell does not count" "$connect"
    fi
}

# of_reach: the way to the cache, whomever the daemon trusts. A failure where there is no cache.
of_reach() {
    said=$(ask -k)
    status=$?
    if [ "$status" -eq 0 ] && is_cache; then
        if says '^< HTTP/[0-9.]* 50[234]' || says '^< cache-status:.*upstream-failed'; then
            noted "the cache does not reach the registry" "only models that it has stored can be pulled now" \
                "ollama-cache doctor on the cache's machine"
        fi
        return
    fi
    case $status in
        7 | 28)
            found "the cache cannot be reached" "$address: $(problem)" \
                "ollama-cache doctor on the cache's machine; then look for a firewall between here and there"
            ;;
        *)
            if says '^curl: ([0-9]*) Could not resolve proxy'; then
                found "the cache's name is unknown here" "$address: $(problem)" \
                    "give it a name in this network's DNS or /etc/hosts, or use its address: $connect"
            elif [ "$status" -eq 3 ] || [ "$status" -eq 5 ]; then
                found "HTTPS_PROXY is no address of a proxy" "$(problem)" "$connect"
            elif says '^< server: ollama-cache'; then
                found "HTTPS_PROXY names the port that is no proxy" "$address gives pages and models by plain HTTP" \
                    "HTTPS_PROXY with the port of the cache's proxy, usually 8080: $connect"
            elif says '^< HTTP/[0-9.]* 200'; then
                signer=$(printf '%s\n' "$said" | sed -n 's/^\* *issuer: //p' | head -n 1)
                found "the proxy is no ollama-cache" \
                    "$address passes the registry on unread, or signs as ${signer:-nobody}: nothing is cached" \
                    "HTTPS_PROXY with the cache's address: $connect"
            elif says '^< HTTP/'; then
                found "the proxy refuses" "$address: $(problem)" "HTTPS_PROXY with the cache's address: $connect"
            else
                found "the cache does not let us in" "$address: $(problem)" \
                    "name this machine's network in ollama_cache_clients, on the cache's machine"
            fi
            ;;
    esac
    return 1
}

# of_clock: a failure where the certificates cannot be judged for it.
of_clock() {
    ahead=$(seconds_ahead)
    [ "${ahead:-0}" -gt 300 ] || [ "${ahead:-0}" -lt -300 ] || return 0
    side='ahead of'
    [ "$ahead" -gt 0 ] || side=behind
    found "the clock is wrong" "it is ${ahead#-} s $side the cache's: certificates seem expired, or not valid yet" \
        "sudo timedatectl set-ntp true, here or on the cache's machine"
    return 1
}

# of_list: whether the daemon can read the list that SSL_CERT_FILE names.
of_list() {
    what="SSL_CERT_FILE cannot be read"
    user=$(stat -c %U "/proc/$pid")
    if [ ! -e "$root$own" ]; then
        found "$what" "$own: there is no such file" "$connect"
        return 1
    elif [ ! -f "$root$own" ]; then
        found "$what" "$own: it is no file" "$connect"
        return 1
    elif is_file "$root$own" && ! limited grep -qs 'BEGIN .*CERTIFICATE' "$root$own"; then
        found "$what" "$own: there is no certificate in it" "$connect"
        return 1
    elif is_file "$root$own" && limited grep -qs 'BEGIN .*PRIVATE KEY' "$root$own"; then
        found "$what" "$own: there is a private key in it, which is not to be a list of certificates" "$connect"
        return 1
    fi
    case "$user $(ls -ldL "$root$own")" in
        root* | "$user "???????r* | "$user "*" $user "*) ;;
        *)
            found "$what" "$own: the daemon's user $user may not" "sudo chmod a+r $(quoted "$own") && $restart"
            return 1
            ;;
    esac
}

of_trust() {
    of_clock || return
    own=''
    if [ "$(uname)" = Linux ]; then
        own=$(variable SSL_CERT_FILE "$environment")
        folders=$(variable SSL_CERT_DIR "$environment")
        # A daemon in a container has its own.
        [ -n "$root" ] || ! [ -r "/proc/$pid/root"/etc ] || root=/proc/$pid/root
        [ -z "$own" ] || of_list || return
    fi
    folders=$root${folders:-/etc/ssl/certs:$root/etc/pki/tls/certs}
    list=/dev/null
    for file in ${own:-$lists}; do
        is_file "$root$file" && list=$root$file && break
    done
    ours=$(for folder in $anchors; do ls "$root$folder"/ollama-cache*; done 2>/dev/null)
    if reason=$(trusts); then
        of_start
        return
    fi
    what="the daemon does not trust the cache"
    why="$reason: each pull ends with x509: certificate signed by unknown authority"
    case $reason in
        *REVOCATION*)
            noted "curl here wants a list of revoked certificates" "$reason; Ollama does not ask for one" \
                "curl --ssl-revoke-best-effort, where you try it by hand"
            return
            ;;
        *expired* | *'not yet valid'*)
            found "the cache's certificate is out of its time" "$reason" \
                "ollama-cache doctor on the cache's machine, and sudo timedatectl set-ntp true on both"
            return
            ;;
        *'permitted subtree'*)
            found "the cache's authority does not vouch for $registry" "$reason" \
                "ollama-cache ca renew on the cache's machine"
            return
            ;;
    esac
    if [ -z "$own" ] && [ -n "$ours" ]; then
        why="it trusts an authority of an ollama-cache, and not this one, which is newer or another cache's"
        for file in $ours; do
            is_file "$file" || continue
            limited grep -qsF -e "$(limited sed -n 2p "$file")" "$list" && continue
            take_over=update-ca-certificates
            command -v "$take_over" >/dev/null || take_over=update-ca-trust
            found "$what" "${file#"$root"} is not among the system's certificates yet" "sudo $take_over && $restart"
            return
        done
    fi
    found "$what" "$why" "$connect"
}

# of_start: Go reads the list once, when it first needs it.
of_start() {
    [ -z "$own" ] || ours=$root$own
    began=$(($(date +%s) - $(age_of "$pid")))
    for file in $ours; do
        written=$(stat -L -c %Y "$file" 2>/dev/null || stat -L -f %m "$file")
        # To a second is not known when the process began.
        if [ "$((written - 2))" -gt "$began" ]; then
            found "the certificate came after the daemon's start" \
                "${file#"$root"} is newer than the process, which reads it once" "$restart"
            return
        fi
    done
}

case ${1-} in
    --fields) fields=yes ;;
    '') ;;
    *)
        echo "ollama-cache: expected --fields or nothing, got '$1'" >&2
        exit 2
        ;;
esac
command -v curl >/dev/null || {
    echo "ollama-cache: expected the program curl, got none: install it, and try again" >&2
    exit 2
}
restart='quit Ollama and open it again'
command -v systemctl >/dev/null && restart='sudo systemctl restart ollama'

configured=$(service)
environment=$configured
find_daemon
if [ -n "$pid" ]; then
    environment=$(environment_of "$pid") || {
        echo "ollama-cache: process $pid is another user's; sudo shows more than what its service is to have" >&2
        environment=$configured
    }
fi
version=$(version_of_daemon)
if [ -z "$pid$version" ]; then
    why="no process \`ollama serve\` runs"
    [ -z "$stranger" ] || why="$why but $stranger, which is not believed: it is not of root, ollama, the service's user or yours"
    found "no Ollama daemon was found" "$why" "sudo systemctl start ollama"
    finish
elif [ -z "$pid" ]; then
    found "the Ollama daemon cannot be looked at" "it answers, but its process is in a container or another user's" \
        "run this with sudo, on the machine or in the container where the daemon runs"
    finish
fi

proxy=$(variable HTTPS_PROXY "$environment")
if [ -z "$proxy" ]; then
    of_absence
    finish
fi
if [ -n "$(variable HTTP_PROXY "$environment")" ]; then
    found "the daemon has HTTP_PROXY" "the ollama command sends its own requests to the daemon through it" \
        "take HTTP_PROXY out of the service (sudo systemctl edit ollama), then $restart"
fi
# What is shown of it has no password.
address=${proxy#*://}
address=${address##*@}
address=${address%%/*}
case $address in *:*) ;; *) address=$address:80 ;; esac
cache=${address%:*}
case $proxy in
    http://*) ;;
    https://*)
        found "HTTPS_PROXY begins with https://" "the way to the cache itself is plain HTTP; TLS towards it fails" \
            "HTTPS_PROXY=$(quoted "http://$address"): $connect"
        finish
        ;;
    *://*)
        found "HTTPS_PROXY is no address of a proxy" "expected http://CACHE:8080, got ${proxy%%://*}://" "$connect"
        finish
        ;;
esac
none=$(variable NO_PROXY "$environment")
past=$(passed)
if [ -n "$past" ]; then
    found "NO_PROXY covers what is cached" "it leads past the cache for $past" \
        "take it out of NO_PROXY of the service (sudo systemctl edit ollama), then $restart"
fi
of_reach || finish
if [ -n "$version" ] && is_past "$version" && ! comes_directly; then
    found "this Ollama goes past the cache" \
        "Ollama $version downloads past every proxy, so nothing that it pulls is cached" "$past_proxy"
fi
of_trust
finish
