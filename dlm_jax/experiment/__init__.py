# SPDX-License-Identifier: Apache-2.0
"""From a configuration to a finished run: config, what it names, evaluators, the run itself."""
