#!/bin/sh
# Let this user's Ollama app pull through an ollama-cache: trust the authority below, which can vouch only for
#     @@{names}
# and names below them, and set HTTPS_PROXY, now and at each login. macOS has no setting for one app alone: others that
# look at HTTPS_PROXY use the cache as a plain proxy, which passes them on unread. A second run changes nothing.
#
#   sh macos.sh http://CACHE:8080
#   sh macos.sh --undo
#
# Run it as the user, not by sudo; it asks for the password where it needs to. OLLAMA_CACHE_ROOT is a folder that stands
# for / where files are written.
set -eu
umask 022

root=${OLLAMA_CACHE_ROOT-}
label=ollama-cache
kept="$root$HOME/Library/Application Support/ollama-cache/client.sh" # this, so that --undo can be found later
agents=$root$HOME/Library/LaunchAgents
agent=$agents/$label.plist
keychain=/Library/Keychains/System.keychain
fingerprints='@@{hashes}'
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

# certificate NUMBER: one of ours, as a file.
certificate() {
    printf '%s\n' "$certificates" | awk -v n="$1" '/-BEGIN/ { at++ } at == n' >"$scratch/ca.pem"
}

is_trusted() { security find-certificate -a -Z "$keychain" | grep -q "SHA-256 hash: $1"; }

proxy='' undo='' changed=''
for argument do
    case $argument in
        --undo) undo=yes ;;
        *[!]A-Za-z0-9.:/_[-]*) die "expected http://CACHE:PORT, got '$argument'" ;;
        http://?*:[0-9]*) proxy=$argument ;;
        *) die "expected http://CACHE:PORT or --undo, got '$argument'" ;;
    esac
done
[ -n "$undo$proxy" ] || die "expected http://CACHE:PORT, the proxy's address, got nothing"
command -v launchctl >/dev/null || die "expected macOS, got a system without launchctl"
[ "$(id -u)" != 0 ] || [ -n "$root" ] || die "expected to run as the user of the Ollama app, got root"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
number=0

if [ -n "$undo" ]; then
    if [ -e "$agent" ]; then
        launchctl unsetenv HTTPS_PROXY
        rm "$agent"
        changed=yes
    fi
    for fingerprint in $fingerprints; do
        number=$((number + 1))
        is_trusted "$fingerprint" || continue
        certificate "$number"
        sudo security remove-trusted-cert -d "$scratch/ca.pem"
        sudo security delete-certificate -Z "$fingerprint" "$keychain"
        changed=yes
    done
    rm -f "$kept"
    rmdir "${kept%/*}" 2>/dev/null || :
    tell "undone; quit Ollama and open it again" "nothing to undo"
    exit
fi

set_proxy=$(launchctl getenv HTTPS_PROXY || :)
[ -e "$agent" ] || [ -z "$set_proxy" ] || [ "$set_proxy" = "$proxy" ] ||
    die "expected no HTTPS_PROXY of another kind, got one: launchctl unsetenv HTTPS_PROXY, and make it the cache's own"

for fingerprint in $fingerprints; do
    number=$((number + 1))
    is_trusted "$fingerprint" && continue
    certificate "$number"
    sudo security add-trusted-cert -d -r trustRoot -k "$keychain" "$scratch/ca.pem"
    changed=yes
done
cat >"$scratch/agent" <<END
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0">
<dict>
    <key>Label</key>
    <string>$label</string>
    <key>ProgramArguments</key>
    <array>
        <string>/bin/launchctl</string>
        <string>setenv</string>
        <string>HTTPS_PROXY</string>
        <string>$proxy</string>
    </array>
    <key>RunAtLoad</key>
    <true/>
</dict>
</plist>
END
if ! cmp -s "$scratch/agent" "$agent" || [ "$set_proxy" != "$proxy" ]; then
    mkdir -p "$agents"
    cp "$scratch/agent" "$agent"
    launchctl setenv HTTPS_PROXY "$proxy"
    changed=yes
fi
[ ! -f "$0" ] || cmp -s "$0" "$kept" || {
    mkdir -p "${kept%/*}"
    cp "$0" "$kept"
}
say "sh '${kept#"$root"}' --undo takes it back"
tell "set up; quit Ollama and open it again" "nothing to change"
