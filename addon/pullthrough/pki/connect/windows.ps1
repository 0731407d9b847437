# Let this user's Ollama app pull through an ollama-cache: trust the authority below, which can vouch only for
#     @@{names}
# and names below them, and set HTTPS_PROXY for this user. Windows has no setting for one app alone: others that look at
# HTTPS_PROXY use the cache as a plain proxy, which passes them on unread. A second run changes nothing.
#
#   powershell -ExecutionPolicy Bypass -File windows.ps1 http://CACHE:8080
#   powershell -ExecutionPolicy Bypass -File windows.ps1 -Undo
#
# It leaves itself as %LOCALAPPDATA%\ollama-cache\client.ps1, so that -Undo can be found later.
#
# Windows asks before it trusts, and before it forgets: the SHA-256 is
#   @@{fingerprints}
param([string]$Proxy = '', [switch]$Undo)
$ErrorActionPreference = 'Stop'
$ours = 'HTTPS_PROXY_OF_OLLAMA_CACHE' # what we set, so that -Undo takes back nothing else
$kept = Join-Path $env:LOCALAPPDATA 'ollama-cache\client.ps1'
$certificates = @'
@@{certificates}
'@

function Get-Setting($name) { [Environment]::GetEnvironmentVariable($name, 'User') }
function Set-Setting($name, $value) { [Environment]::SetEnvironmentVariable($name, $value, 'User') }

if (-not $Undo -and $Proxy -notmatch '^http://[A-Za-z0-9.:_\[\]-]+:[0-9]+$') {
    throw "expected http://CACHE:PORT or -Undo, got '$Proxy'"
}
$set = Get-Setting 'HTTPS_PROXY'
if (-not $Undo -and $set -and $set -ne $Proxy -and $set -ne (Get-Setting $ours)) {
    throw 'expected no HTTPS_PROXY of another kind, got one: take it away, and make it the cache''s own'
}

$changed = $false
$store = [Security.Cryptography.X509Certificates.X509Store]::new('Root', 'CurrentUser')
$store.Open('ReadWrite')
try {
    foreach ($match in [regex]::Matches($certificates, '(?s)-----BEGIN CERTIFICATE-----(.+?)-----END')) {
        $raw = [Convert]::FromBase64String($match.Groups[1].Value)
        $certificate = [Security.Cryptography.X509Certificates.X509Certificate2]::new([byte[]]$raw)
        if ($store.Certificates.Contains($certificate) -ne $Undo.IsPresent) { continue }
        if ($Undo) { $store.Remove($certificate) } else { $store.Add($certificate) }
        $changed = $true
    }
} finally {
    $store.Close()
}

if ($Undo) {
    if ($set -and $set -eq (Get-Setting $ours)) {
        Set-Setting 'HTTPS_PROXY' $null
        $changed = $true
    }
    Set-Setting $ours $null
    if (Test-Path $kept) { Remove-Item -Recurse (Split-Path $kept) }
} elseif ($set -ne $Proxy) {
    Set-Setting 'HTTPS_PROXY' $Proxy
    Set-Setting $ours $Proxy
    $changed = $true
}
if (-not $Undo -and $PSCommandPath -ne $kept) {
    $null = New-Item -ItemType Directory -Force (Split-Path $kept)
    Copy-Item -Force $PSCommandPath $kept
    "ollama-cache: powershell -ExecutionPolicy Bypass -File '$kept' -Undo takes it back"
}
if ($changed) { 'ollama-cache: done; quit Ollama from the tray and start it again' } else { 'ollama-cache: nothing to change' }
