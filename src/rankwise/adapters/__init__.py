"""Everything that knows PEFT: the config classes, the one layer, the one tuner, and their registration."""

import peft  # noqa: F401  first of all: the hook set by `import rankwise` then registers before any module here needs it
