# SPDX-License-Identifier: Apache-2.0
"""A student in minutes: distilled from the shipped teacher, or shipped; compared, reported."""
