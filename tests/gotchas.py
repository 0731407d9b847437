"""What has broken Ollama pulls through caches and proxies, and what shows that it does not break here.

One row per trap that the clients' sources and issues have taught. `tests` are node ids below `tests/`; a row without
any says in `why` why it cannot arise. The table is printed after a test run with what has become of each row, and
stands in docs/compatibility.md.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Gotcha:
    """A trap: what a cache must do, and the proof that it is done here."""

    must: str
    tests: tuple[str, ...] = ()
    why: str = ""


MATRIX: Final = "e2e/test_matrix.py::test_matrix"
HELD: Final = "e2e/test_modes.py::test_a_head_is_held_until_the_blob_is_complete"

GOTCHAS: Final = (
    Gotcha(
        "answer an un-ranged blob GET with a 307 to another host name",
        ("e2e/test_answers.py::test_blob_redirect_keeps_the_scheme_and_the_hosts", MATRIX),
    ),
    Gotcha(
        "never answer it with 301, 302, 303 or 308",
        ("e2e/test_answers.py::test_blob_redirect_keeps_the_scheme_and_the_hosts", MATRIX),
    ),
    Gotcha(
        "redirect to another host name, not only another port",
        ("unit/config/test_options.py::test_bad_values_are_named", MATRIX),
    ),
    Gotcha("use the one answer that every generation accepts, whatever asks", (MATRIX,)),
    Gotcha(
        "redirect to no subdomain of the registry, which would be sent the token",
        (
            "unit/config/test_options.py::test_bad_values_are_named",
            "e2e/test_clients.py::test_a_token_stays_with_the_registry",
        ),
    ),
    Gotcha(
        "answer HEAD of a blob itself: 200, the true length, no body, no redirect",
        ("e2e/test_answers.py::test_head_of_a_blob",),
    ),
    Gotcha(
        "keep the length of a HEAD although there is no body",
        (
            "e2e/test_answers.py::test_head_of_a_blob",
            "e2e/test_answers.py::test_if_range_and_head_at_the_canonical_address",
        ),
    ),
    Gotcha(
        "honour every single range exactly",
        (
            "e2e/test_answers.py::test_three_hundred_ranges_on_a_cold_blob",
            "unit/core/test_ranges.py::test_range_grammar",
            "unit/core/test_ranges.py::test_agrees_with_slicing",
        ),
    ),
    Gotcha(
        "never send a text where a client expects the model's bytes",
        (
            "e2e/test_streams.py::test_an_unusable_source_is_a_status_without_text",
            "e2e/test_streams.py::test_a_hopeless_recording_ends_short_and_clean",
        ),
    ),
    Gotcha(
        "obtain an expired CDN address again and go on",
        (
            "e2e/test_clients.py::test_expired_addresses_are_obtained_again",
            "e2e/test_registries.py::test_addresses_that_do_not_last",
        ),
    ),
    Gotcha(
        "end a failed body over HTTP/1.1 with FIN, so that the client keeps its progress",
        (
            "e2e/test_streams.py::test_a_hopeless_recording_ends_short_and_clean",
            "e2e/test_gate.py::test_intercepted_hosts_show_our_leaf",
        ),
    ),
    Gotcha(
        "keep bytes coming: old clients wait 5 s, new ones 30 s, for the first byte too",
        ("e2e/test_pull.py::test_eight_cold_clients_cost_one", "e2e/test_long.py::test_eight_clients"),
    ),
    Gotcha(
        "answer the probe within 30 s, retries included",
        (
            "unit/registry/test_service.py::test_a_blob_request_has_a_deadline",
            "unit/registry/test_manifests.py::test_a_request_has_a_deadline",
        ),
    ),
    Gotcha(
        "never pause a body for 10 s (tensor models)",
        (HELD, "e2e/test_modes.py::test_slow_line"),
    ),
    Gotcha(
        "not be called slow by x/transfer after fast hits",
        (HELD, "e2e/test_modes.py::test_slow_line", "e2e/test_front.py::test_a_slow_tensor_after_fast_ones"),
    ),
    Gotcha(
        "not push back with 5xx and Retry-After",
        ("e2e/test_streams.py::test_slow_clients_cost_little_memory",),
        why="No request is ever refused for load: clients are slowed by their own sockets.",
    ),
    Gotcha(
        "know that x/transfer (tensor models) ignores HTTPS_PROXY",
        (
            "e2e/test_clients.py::test_tensor_models_pass_by",
            "e2e/test_modes.py::test_gateway",
            "e2e/test_modes.py::test_hosts_entry",
            "e2e/test_front.py::test_every_client",
        ),
    ),
    Gotcha(
        "not invent HEAD hits: a push asks the same HEAD and skips the upload",
        ("e2e/test_answers.py::test_head_of_a_blob",),
    ),
    Gotcha(
        "give private layers to nobody who merely knows the digest",
        (
            "e2e/test_security.py::test_recent",
            "e2e/test_answers.py::test_without_a_capability_nothing_is_served_or_recorded",
            "unit/net/test_client_acl.py::test_decision_table",
        ),
    ),
    Gotcha(
        "neither take Authorization for privacy nor store a 401 or 412",
        (
            "e2e/test_answers.py::test_refusals_are_relayed_and_never_stored",
            "unit/registry/test_manifests.py::test_authorization_is_not_sent_before_it_is_needed",
        ),
    ),
    Gotcha(
        "ask again for a client too old for the stored manifest (412 by version)",
        ("e2e/test_answers.py::test_version_gate", "unit/registry/test_freshness.py::test_version_gate"),
    ),
    Gotcha(
        "revalidate tags, and serve stale ones only while upstream does not answer",
        (
            "unit/registry/test_freshness.py::test_decision",
            "unit/registry/test_manifests.py::test_revalidated",
            "e2e/test_pull.py::test_stale_manifest_is_served_while_upstream_is_down",
        ),
    ),
    Gotcha("serve manifests byte for byte", ("e2e/test_answers.py::test_manifest_is_byte_exact",)),
    Gotcha(
        "answer HEAD of a manifest with ollama-content-digest; leave ollama.com alone",
        (
            "e2e/test_answers.py::test_manifest_is_byte_exact",
            "e2e/test_ways.py::test_other_hosts_are_tunnelled_unread",
        ),
    ),
    Gotcha(
        "find a manifest that is asked for as a blob (client2, name@digest)",
        ("e2e/test_answers.py::test_a_manifest_by_its_digest", "e2e/test_clients.py::test_client2_pulls_by_digest"),
    ),
    Gotcha(
        "support chunksums, offline too",
        (MATRIX, "unit/upstream/test_chunksums.py::test_refused"),
    ),
    Gotcha(
        "believe no digest in the path of an unknown host",
        (
            "e2e/test_answers.py::test_without_a_capability_nothing_is_served_or_recorded",
            "unit/core/test_routes.py::test_other_targets_of_the_blob_host",
            "e2e/test_registries.py::test_hugging_face",
        ),
    ),
    Gotcha(
        "verify before a file becomes a hit, and never mix two versions of a source",
        ("e2e/test_answers.py::test_a_corrupted_byte_never_becomes_a_hit",),
    ),
    Gotcha(
        "make one upstream transfer of all parts of all clients",
        ("e2e/test_pull.py::test_eight_cold_clients_cost_one", MATRIX),
    ),
    Gotcha(
        "go on when a client goes away",
        ("e2e/test_pull.py::test_a_leaving_client_changes_nothing_for_others",),
    ),
    Gotcha(
        "hold no body in memory",
        (
            "e2e/test_streams.py::test_many_large_ranges_stay_within_memory",
            "e2e/test_long.py::test_sixteen_ranges_of_4_gib",
        ),
    ),
    Gotcha("serve hits while upstream is down", ("e2e/test_pull.py::test_cold_warm_offline_restarted", MATRIX)),
    Gotcha(
        "stream what is not its own: pushes, cloud models, tokens",
        ("e2e/test_streams.py::test_uploads_flow_through", "e2e/test_ways.py::test_other_hosts_are_tunnelled_unread"),
    ),
    Gotcha(
        "serve http:// too (--insecure)",
        ("e2e/test_clients.py::test_names_and_schemes",),
        why="Registries on localhost never come here: Go does not proxy loopback.",
    ),
    Gotcha(
        "resume without HEAD at odd offsets; a digest's size never changes",
        ("e2e/test_pull.py::test_resumed_client", MATRIX),
    ),
    Gotcha(
        "never compress blobs, whatever Accept-Encoding says",
        ("e2e/test_clients.py::test_request_headers_make_no_difference",),
    ),
    Gotcha(
        "take tiny blobs in its stride",
        ("e2e/test_answers.py::test_sizes_around_the_edges",),
    ),
    Gotcha(
        "ignore Referer, User-Agent and Authorization of a CDN request",
        ("e2e/test_clients.py::test_request_headers_make_no_difference",),
    ),
)


def shown(outcomes: Mapping[str, str] | None = None) -> Iterator[tuple[int, str, str]]:
    """(number, trap, proof) of each row; with outcomes by node id, the proof is what has become of it."""
    for number, gotcha in enumerate(GOTCHAS, start=1):
        if outcomes is None or not gotcha.tests:
            names = list(dict.fromkeys(test.partition("::")[2] for test in gotcha.tests))
            proof = " ".join(filter(None, [", ".join(f"`{name}`" for name in names), gotcha.why]))
        else:
            found = [outcomes.get(test, "not run") for test in gotcha.tests]
            proof = next((word for word in ("failed", "passed", "skipped") if word in found), "not run")
        yield number, gotcha.must, proof


def markdown() -> str:
    """Return the table of docs/compatibility.md."""
    rows = [f"| {number} | {must} | {proof} |" for number, must, proof in shown()]
    return "\n".join(["| | a cache must… | shown by |", "| --- | --- | --- |", *rows, ""])
