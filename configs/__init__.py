# SPDX-License-Identifier: Apache-2.0
"""One experiment per file. `get_config()` returns every field; `common.base` explains them."""
