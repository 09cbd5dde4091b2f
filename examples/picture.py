"""A photograph of which half the pixels are missing, restored: `python examples/picture.py`.

scikit-learn's sample image, its three colours side by side as one 427 by 1920 matrix. Writes `picture.png`, or the path
given: the photograph, what was left of it, and what came back.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_image

from rankwise.completion import DeepMatrixCompletion

picture = load_sample_image("china.jpg") / 255  # (427, 640, 3)
missing = np.random.default_rng(0).random(picture.shape[:2]) < 0.5
damaged = np.where(missing[:, :, None], np.nan, picture)

model = DeepMatrixCompletion(rank=60, random_state=0)
flat = model.fit_transform(damaged.reshape(len(picture), -1))
restored = flat.reshape(picture.shape).clip(0, 1)

error = np.linalg.norm((restored - picture)[missing]) / np.linalg.norm(picture[missing])
print(f"rank {model.rank_}, relative error of the missing pixels {error:.3f}")

figure, panels = plt.subplots(1, 3, figsize=(13.5, 3.5), layout="constrained")
shown = {"photograph": picture, "half its pixels": np.nan_to_num(damaged), "restored": restored}
for panel, (title, pixels) in zip(panels, shown.items(), strict=True):
    panel.imshow(pixels)
    panel.set_title(title)
    panel.axis("off")
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "picture.png", dpi=70)
