# SPDX-License-Identifier: Apache-2.0
"""One experiment per file: `get_config()` returns every field, or `get_config(variant)`.

`base` explains the fields. A function of `recipes` sets those of one thing: a corpus, a network, a
method, a schedule of updates. No two that an experiment calls set the same field, so their order
means nothing; what the experiment itself sets stands after them, and stays.
"""
