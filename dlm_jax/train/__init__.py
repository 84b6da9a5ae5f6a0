# SPDX-License-Identifier: Apache-2.0
"""The training loop and what it needs: optimisers, checkpoints, metric writers."""
