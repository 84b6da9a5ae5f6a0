# SPDX-License-Identifier: Apache-2.0
"""What a model is worth: likelihood, quality of samples, quality against cost.

```python
judge = evaluate.Judge(model, params)
print(evaluate.quality(judge, tokens_BL, eos_id=0))  # GenPPL 41.3 ± 1.2, entropy 5.28 ± 0.02 nats …
```
"""

from dlm_jax.evaluate import frontier, proteins
from dlm_jax.evaluate.blocks import block_elbo
from dlm_jax.evaluate.generative import (
  Quality,
  entropies,
  entropy,
  features,
  genppl,
  mauve,
  quality,
  retokenise,
)
from dlm_jax.evaluate.likelihood import Judge, ar_perplexity, elbo

__all__ = [
  "Judge",
  "Quality",
  "ar_perplexity",
  "block_elbo",
  "elbo",
  "entropies",
  "entropy",
  "features",
  "frontier",
  "genppl",
  "mauve",
  "proteins",
  "quality",
  "retokenise",
]
