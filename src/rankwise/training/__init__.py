"""Everything that knows optimisers and trainers: when a method's rules run, and on what."""

import rankwise.adapters  # noqa: F401  first of all, as in there
