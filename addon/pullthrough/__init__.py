"""A pull-through cache for the Ollama registry, living inside mitmproxy.

What runs is owned by one `daemon.Daemon`; importing any module of this package starts nothing.

A package imports only from those below its own row: `lint-imports` checks the contracts of pyproject.toml.

    addon        what mitmproxy loads: options, start and end

    daemon       every part is built, opened and closed here
    proxy        mitmproxy's hooks, and the policy at its doors
    cli          the command line

    server       the plain port: models and pages

    delivery     bytes to clients, in threads

    admin        the control socket of the command line
    monitoring   metrics, health, the status page, log lines

    registry     requests to a registry in, answers out

    recording    how blobs come in, and how they are read

    fleet        what several caches share through an object store
    library      list, remove, evict, verify, import, export
    doctor       what is wrong with a cache, or with the way to it

    store        blobs, manifests, and the index of them
    upstream     our own client of registries and blob hosts, and what is believed of their answers
    pki          the certificate authority, and setting up clients

    net          who may connect, where connections may lead
    runtime      files, threads, clocks, the system

    config       options, settings, default places

    core         values and grammars: digests, routes, ranges, manifests, errors
"""
