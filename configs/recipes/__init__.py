# SPDX-License-Identifier: Apache-2.0
"""What experiments have in common: one function per recipe, which sets the fields that it means."""
