# Find out why this user's Ollama does not pull through an ollama-cache, and name the command that mends it. Nothing is
# changed.
#
#   powershell -Command "irm http://CACHE:@@{port}/doctor.ps1 | iex"
#
# What a running Ollama was started with Windows does not show: the settings of the user and the machine stand for it.
# With -Fields each finding is one line: yes or no for a fault that stops it now, what, why and mend, between tabs.
param([switch]$Fields)
$ErrorActionPreference = 'Stop'

$hosts = '@@{hosts}' -split ' ' # the registry first
$plainPort = '@@{port}'
$firstPast = [version]'@@{first}' # the versions of Ollama that download past every proxy
$lastPast = [version]'@@{last}'
$patience = 5000 # milliseconds for a connection
$registry = $hosts[0]
$connect = "run here the line that 'ollama-cache connect --for windows' prints on the cache's machine"
$restart = 'quit Ollama from the tray and start it again'
$findings = [Collections.ArrayList]::new()

function Add-Finding([string]$what, [string]$why, [string]$mend, [bool]$grave = $true) {
    [void]$findings.Add(@($(if ($grave) { 'yes' } else { 'no' }), $what, $why, $mend))
}

function Get-Setting([string]$name) {
    $value = [Environment]::GetEnvironmentVariable($name, 'User')
    if ($value) { $value } else { [Environment]::GetEnvironmentVariable($name, 'Machine') }
}

# What stopped a call, without the words that PowerShell puts around it.
function Get-Reason($record) { $record.Exception.GetBaseException().Message -replace '\s+', ' ' }

function Get-DaemonVersion {
    $where = (Get-Setting 'OLLAMA_HOST') -replace '^[a-z]+://', '' -replace '/$', '' -replace '^0\.0\.0\.0', '127.0.0.1'
    if (-not $where) { $where = '127.0.0.1' }
    if ($where -notmatch ':\d+$') { $where = "${where}:11434" }
    try {
        $request = [Net.WebRequest]::Create("http://$where/api/version")
        $request.Proxy = $null
        $request.Timeout = $patience
        $reader = [IO.StreamReader]::new($request.GetResponse().GetResponseStream())
        ($reader.ReadToEnd() | ConvertFrom-Json).version
    } catch { '' }
}

# Whether this member of NO_PROXY is about the host at port 443, by the rules of Go.
function Test-Covered([string]$member, [string]$name) {
    $member = $member.Trim().ToLowerInvariant()
    if ($member -eq '*') { return $true }
    $member = $member -replace ':443$', '' -replace '^\*', ''
    if (-not $member -or $member -match '[:/]') { return $false }
    if ($member.StartsWith('.')) { return $name.EndsWith($member) }
    $name -eq $member -or $name.EndsWith(".$member")
}

function Read-Head($stream) {
    $text = [Text.StringBuilder]::new()
    while (-not $text.ToString().EndsWith("`r`n`r`n") -and $text.Length -lt 16384) {
        $byte = $stream.ReadByte()
        if ($byte -lt 0) { break }
        [void]$text.Append([char]$byte)
    }
    $text.ToString()
}

function Send-Text($stream, [string]$text) {
    $bytes = [Text.Encoding]::ASCII.GetBytes($text)
    $stream.Write($bytes, 0, $bytes.Length)
    $stream.Flush()
}

# Ask the registry for nothing, by a proxy or, without a host, directly. A step that failed stands in Failed: connect,
# answer (to CONNECT), tls or reply.
function Invoke-Question([string]$proxyHost, [int]$proxyPort, [bool]$verify) {
    $result = @{ Failed = 'connect'; Reason = ''; Head = ''; Issuer = '' }
    $client = [Net.Sockets.TcpClient]::new()
    try {
        $there = if ($proxyHost) { $proxyHost } else { $registry }
        $port = if ($proxyHost) { $proxyPort } else { 443 }
        $pending = $client.BeginConnect($there, $port, $null, $null)
        if (-not $pending.AsyncWaitHandle.WaitOne($patience)) { throw "no answer in $($patience / 1000) s" }
        $client.EndConnect($pending)
        $client.ReceiveTimeout = $client.SendTimeout = $patience
        $stream = $client.GetStream()
        if ($proxyHost) {
            $result.Failed = 'answer'
            Send-Text $stream "CONNECT ${registry}:443 HTTP/1.1`r`nHost: ${registry}:443`r`n`r`n"
            $result.Head = Read-Head $stream
            if ($result.Head -notmatch '^HTTP/1\.[01] 200') {
                throw $(if ($result.Head) { ($result.Head -split "`r`n")[0] } else { 'it hung up' })
            }
        }
        $result.Failed = 'tls'
        # As Go does, Windows is asked whom it trusts, and nobody for a list of revoked certificates.
        $judge = if ($verify) { $null } else { [Net.Security.RemoteCertificateValidationCallback] { $true } }
        $tls = [Net.Security.SslStream]::new($stream, $false, $judge)
        $tls.AuthenticateAsClient($registry, $null, [Security.Authentication.SslProtocols]::Tls12, $false)
        $result.Issuer = $tls.RemoteCertificate.Issuer
        $result.Failed = 'reply'
        Send-Text $tls "GET /v2/ HTTP/1.1`r`nHost: $registry`r`nConnection: close`r`n`r`n"
        $result.Head = Read-Head $tls
        $result.Failed = ''
    } catch {
        $result.Reason = Get-Reason $_
    } finally {
        $client.Dispose()
    }
    $result
}

function Test-Cache($answer) { $answer.Head -match '(?im)^cache-status:.*ollama-cache' }

function Get-SecondsAhead([string]$cache) {
    if (-not $plainPort) { return 0 }
    try {
        $request = [Net.WebRequest]::Create("http://${cache}:$plainPort/ca.crt")
        $request.Method = 'HEAD'
        $request.Proxy = $null
        $request.Timeout = $patience
        $response = $request.GetResponse()
        $response.Close()
        [int]([DateTimeOffset]::UtcNow - [DateTimeOffset]::Parse($response.Headers['Date'])).TotalSeconds
    } catch { 0 }
}

function Find-Trust([string]$cache, [string]$proxyHost, [int]$proxyPort) {
    $ahead = Get-SecondsAhead $cache
    if ([Math]::Abs($ahead) -gt 300) {
        $side = if ($ahead -gt 0) { 'ahead of' } else { 'behind' }
        Add-Finding 'the clock is wrong' `
            "it is $([Math]::Abs($ahead)) s $side the cache's: certificates seem expired, or not valid yet" `
            'w32tm /resync in a prompt of the administrator, or timedatectl set-ntp true on the cache''s machine'
        return
    }
    $answer = Invoke-Question $proxyHost $proxyPort $true
    if ($answer.Failed -eq 'tls') {
        Add-Finding 'Windows does not trust the cache' `
            "$($answer.Reason) Each pull ends with x509: certificate signed by unknown authority" $connect
    }
}

function Find-Names([string]$version) {
    try { $all = [Net.Dns]::GetHostAddresses($registry) } catch { return }
    $private = '^(10\.|127\.|192\.168\.|169\.254\.|172\.(1[6-9]|2\d|3[01])\.|::1$|f[cde][0-9a-f]*:)'
    $inside = @($all | Where-Object { "$_" -match $private })
    $outside = @($all | Where-Object { "$_" -notmatch $private })
    if (-not $inside) { return }
    if ($outside) {
        Add-Finding 'DNS leads past the cache in part' `
            "$registry is $($inside[0]) here, but $($outside[0]) too, and Ollama takes either" `
            "let the DNS server that says $($inside[0]) answer for A and AAAA alike: the cache's addresses, or none"
    }
    if ($version -and [version]($version -replace '[^0-9.].*$', '') -ge $firstPast) {
        Add-Finding 'this Ollama refuses a hosts entry' `
            "$registry is $($inside[0]) here, and Ollama $version takes blobs from public addresses only" `
            "take the entry away, and $connect"
    }
}

function Find-Way([string]$version) {
    $proxy = Get-Setting 'HTTPS_PROXY'
    if (-not $proxy) {
        Find-Names $version
        if (Test-Cache (Invoke-Question '' 0 $false)) { Find-Trust $registry '' 0; return }
        if ($findings.Count) { return }
        Add-Finding 'HTTPS_PROXY is not set' `
            'Ollama goes to the registry directly; a variable of one window does not count' $connect
        return
    }
    if (Get-Setting 'HTTP_PROXY') {
        Add-Finding 'HTTP_PROXY is set' 'the ollama command sends its own requests to the daemon through it' `
            "[Environment]::SetEnvironmentVariable('HTTP_PROXY', `$null, 'User'), then $restart"
    }
    # What is shown of it has no password.
    $address = $proxy -replace '^[A-Za-z0-9+]+://', '' -replace '^.*@', '' -replace '/.*$', ''
    if ($proxy -match '^https://') {
        Add-Finding 'HTTPS_PROXY begins with https://' `
            'the way to the cache itself is plain HTTP; TLS towards it fails' "HTTPS_PROXY=http://${address}: $connect"
        return
    }
    if ($proxy -match '^(?!http:)[^/]*://' -or $address -notmatch '^(?<host>\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(:(?<port>\d+))?$') {
        Add-Finding 'HTTPS_PROXY is no address of a proxy' 'expected http://CACHE:8080, got something else' $connect
        return
    }
    $cache = $Matches['host']
    $port = if ($Matches['port']) { [int]$Matches['port'] } else { 80 }
    $passed = @($hosts | Where-Object {
            $name = $_
            "$(Get-Setting 'NO_PROXY')" -split ',' | Where-Object { Test-Covered $_ $name }
        })
    if ($passed) {
        Add-Finding 'NO_PROXY covers what is cached' "it leads past the cache for $($passed -join ', ')" `
            "take it out of NO_PROXY, then $restart"
    }
    $answer = Invoke-Question $cache.Trim('[', ']') $port $false
    if ($answer.Failed -eq 'connect') {
        Add-Finding 'the cache cannot be reached' "${address}: $($answer.Reason)" `
            'ollama-cache doctor on the cache''s machine; then look at DNS, and for a firewall between here and there'
        return
    }
    if ($answer.Failed -eq 'answer') {
        if ($answer.Head -match '(?im)^server: ollama-cache') {
            Add-Finding 'HTTPS_PROXY names the port that is no proxy' "$address gives pages and models by plain HTTP" `
                "HTTPS_PROXY with the port of the cache's proxy, usually 8080: $connect"
        } elseif ($answer.Head) {
            Add-Finding 'the proxy refuses' "${address}: $($answer.Reason)" "HTTPS_PROXY with the cache's address: $connect"
        } else {
            Add-Finding 'the cache does not let us in' "${address}: $($answer.Reason)" `
                'name this machine''s network in ollama_cache_clients, on the cache''s machine'
        }
        return
    }
    if (-not (Test-Cache $answer)) {
        $signer = if ($answer.Issuer) { $answer.Issuer } else { 'nobody' }
        Add-Finding 'the proxy is no ollama-cache' `
            "$address passes the registry on unread, or signs as ${signer}: nothing is cached" `
            "HTTPS_PROXY with the cache's address: $connect"
        return
    }
    if ($answer.Head -match '^HTTP/1\.[01] 50[234]|(?im)^cache-status:.*upstream-failed') {
        Add-Finding 'the cache does not reach the registry' 'only models that it has stored can be pulled now' `
            'ollama-cache doctor on the cache''s machine' $false
    }
    $told = if ($version) { [version]($version -replace '[^0-9.].*$', '') } else { $null }
    if ($told -and $firstPast -le $told -and $told -le $lastPast -and -not (Test-Cache (Invoke-Question '' 0 $false))) {
        Add-Finding 'this Ollama goes past the cache' `
            "Ollama $version downloads past every proxy, so nothing that it pulls is cached" `
            "upgrade Ollama, make the cache the gateway of this machine (--mode transparent@8081), or pull from its port ${plainPort}: ollama pull --insecure http://CACHE:$plainPort/NAMESPACE/MODEL"
    }
    Find-Trust $cache $cache.Trim('[', ']') $port
}

$version = Get-DaemonVersion
if ($version -or (Get-Process -Name 'ollama' -ErrorAction SilentlyContinue)) {
    Find-Way $version
} else {
    Add-Finding 'no Ollama was found' 'no process ollama.exe runs, and nobody answers for it' 'start Ollama'
}
foreach ($each in $findings) {
    if ($Fields) { $each -join "`t" } else { "$($each[1]): $($each[2])`n    $($each[3])" }
}
if (-not $Fields -and -not $findings.Count) { 'nothing is wrong' }
# A window that runs this by iex would be closed by exit.
if ($Fields) { exit [int][bool]@($findings | Where-Object { $_[0] -eq 'yes' }).Count }
