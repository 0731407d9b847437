#!/bin/sh
# Let this machine's Ollama service pull through an ollama-cache: trust the authority below, which can vouch only for
#     @@{names}
# and names below them, and set HTTPS_PROXY for ollama.service. Nothing else is touched; a second run changes nothing.
#
#   sh linux.sh http://CACHE:8080                      trust by the system's list of certificates
#   sh linux.sh --no-system-store http://CACHE:8080    trust by a list for ollama.service alone
#   sh linux.sh --undo
#
# It leaves itself as /etc/ollama-cache/client.sh, so that --undo can be found later, with the cache or without it.
# OLLAMA_CACHE_ROOT is a folder that stands for / where files are written.
set -eu
umask 022
PATH=$PATH:/usr/sbin:/sbin

root=${OLLAMA_CACHE_ROOT-}
service=ollama.service
drop_in=/etc/systemd/system/$service.d/ollama-cache.conf
own_list=/etc/ollama-cache/roots.pem
kept=/etc/ollama-cache/client.sh
# Where certificates are added, and what takes them over: Debian and Alpine, Fedora, SUSE, Arch.
stores='
/usr/local/share/ca-certificates:update-ca-certificates
/etc/pki/ca-trust/source/anchors:update-ca-trust
/etc/pki/trust/anchors:update-ca-certificates
/etc/ca-certificates/trust-source/anchors:update-ca-trust'
# Where Go looks for the system's list (crypto/x509/root_linux.go).
lists='
/etc/ssl/certs/ca-certificates.crt
/etc/pki/tls/certs/ca-bundle.crt
/etc/ssl/ca-bundle.pem
/etc/pki/tls/cacert.pem
/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem
/etc/ssl/cert.pem'
# SHA-256 @@{fingerprints}
certificates='@@{certificates}'

say() { printf 'ollama-cache: %s\n' "$*" >&2; }
die() {
    say "$@"
    exit 1
}

# tell WORDS WORDS: what was done, or that nothing had to be.
tell() {
    [ -n "$changed" ] || shift
    say "$1"
}

# put FILE: standard input becomes the file, unless it is that already.
put() {
    mkdir -p "$root${1%/*}"
    cat >"$root$1.new"
    if cmp -s "$root$1.new" "$root$1"; then
        rm "$root$1.new"
    else
        mv "$root$1.new" "$root$1"
        changed=yes stale=yes
    fi
}

# drop FILE: there is no such file.
drop() {
    [ -e "$root$1" ] || return 0
    rm "$root$1"
    changed=yes stale=yes
}

# drop_own FILE: there is neither the file nor its folder, if that held nothing else.
drop_own() {
    drop "$1"
    rmdir "$root${1%/*}" 2>/dev/null || :
}

# take_over PROGRAM: what has changed in a store counts from now on.
take_over() {
    [ -n "$stale" ] || return 0
    case $1 in
        # Without --fresh Debian's leaves links to what was removed.
        update-ca-certificates) "$1" --fresh ;;
        *) "$1" ;;
    esac >/dev/null
}

# untrust: no store has a certificate of ours.
untrust() {
    for store in $stores; do
        stale=
        for number in 1 2; do
            drop "${store%:*}/ollama-cache-$number.crt"
        done
        take_over "${store#*:}"
    done
}

# trust: the first store that this system has holds our certificates, one in a file as Debian demands.
trust() {
    for store in $stores; do
        anchors=${store%:*} program=${store#*:} stale=
        [ -d "$root$anchors" ] || continue
        command -v "$program" >/dev/null || continue
        for number in 1 2; do
            certificate=$(printf '%s\n' "$certificates" | awk -v n="$number" '/-BEGIN/ { at++ } at == n')
            if [ -n "$certificate" ]; then
                printf '%s\n' "$certificate" >"$scratch"
                put "$anchors/ollama-cache-$number.crt" <"$scratch"
            else
                drop "$anchors/ollama-cache-$number.crt"
            fi
        done
        take_over "$program" || {
            untrust || : # so that the next run tries again
            die "expected $program to take over $anchors/ollama-cache-1.crt, got a failure"
        }
        return
    done
    die "expected update-ca-certificates or update-ca-trust, got neither: try --no-system-store"
}

# list: a list for the service alone, the system's with our certificates behind.
list() {
    for file in $lists; do
        [ -r "$root$file" ] || continue
        { cat "$root$file" && printf '%s\n' "$certificates"; } >"$scratch"
        put "$own_list" <"$scratch"
        return
    done
    die "expected the system's list of certificates, got none where Go looks for it"
}

proxy='' undo='' alone='' changed='' stale=''
for argument do
    case $argument in
        --undo) undo=yes ;;
        --no-system-store) alone=yes ;;
        *[!]A-Za-z0-9.:/_[-]*) die "expected http://CACHE:PORT, got '$argument'" ;;
        http://?*:[0-9]*) proxy=$argument ;;
        *) die "expected http://CACHE:PORT, --no-system-store or --undo, got '$argument'" ;;
    esac
done
[ -n "$undo$proxy" ] || die "expected http://CACHE:PORT, the proxy's address, got nothing"
[ -n "$root" ] || [ "$(id -u)" = 0 ] || die "expected to run as root, got $(id -un): put sudo before it"
scratch=$(mktemp)
trap 'rm -f "$scratch"' EXIT

if [ -n "$undo" ]; then
    drop_own "$drop_in"
    drop_own "$own_list"
    drop_own "$kept"
    untrust
    if [ -n "$changed" ] && command -v systemctl >/dev/null; then
        systemctl daemon-reload
        systemctl try-restart "$service"
    fi
    tell "undone" "nothing to undo"
    exit
fi

command -v systemctl >/dev/null || die "expected systemd, got a system without systemctl; see docs/clients.md for others"
systemctl cat "$service" >/dev/null 2>&1 || die "expected $service, got none: install Ollama first"
if [ -n "$alone" ]; then
    untrust
    list
else
    trust
    drop_own "$own_list"
fi
before=$changed # nothing has to be started again because of a copy of this
[ ! -f "$0" ] || put "$kept" <"$0"
changed=$before
{
    printf '[Service]\nEnvironment="HTTPS_PROXY=%s"\n' "$proxy"
    [ -z "$alone" ] || printf 'Environment="SSL_CERT_FILE=%s"\n' "$own_list"
} >"$scratch"
put "$drop_in" <"$scratch"
if [ -n "$changed" ]; then
    systemctl daemon-reload
    systemctl try-restart "$service"
fi
case " $(systemctl show --property Environment --value "$service") " in
    *" HTTPS_PROXY=$proxy "*) ;;
    *) die "expected $service to have HTTPS_PROXY=$proxy, got another: see systemctl cat $service, and mend it" ;;
esac
say "sh $kept --undo takes it back"
tell "$service pulls through $proxy" "nothing to change: $service pulls through $proxy"
