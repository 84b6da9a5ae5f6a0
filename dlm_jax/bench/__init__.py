# SPDX-License-Identifier: Apache-2.0
"""Speed of our programs beside the limits of the machine they run on, measured in one process."""
