"""The benchmark behind `scripts/bench`: what it measures, with what load, and how it tells.

    report              table, blocks of docs/benchmarks.md, plot
    rows                the list of rows, each with what limits it
    warm  small  cold   the measurements
    pulls
    servers             nginx and stock mitmdump, and what a process costs
    load                the generator, in processes of its own
    figures             samples, pairs, medians, ratios

A module imports only from lines below its own, from tests/support and from the product.
"""
