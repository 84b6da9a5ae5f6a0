# SPDX-License-Identifier: Apache-2.0
"""Texts in and out: networks with their tokenizers, requests and checks, streaming, pictures."""
