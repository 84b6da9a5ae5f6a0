# SPDX-License-Identifier: Apache-2.0
"""The one exception that means "the user can fix this"."""


class InputError(ValueError):
  """Input that cannot be used. Its message is one line: what was asked, got, allowed, what to do.

  The command line prints the message and exits with code 2.
  """
