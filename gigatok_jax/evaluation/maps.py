"""Maps of a tokenizer's features: their first three principal components as colours (Fig. 8)."""

import numpy as np

from gigatok_jax import api, pictures


def component_maps(features: np.ndarray) -> np.ndarray:
    """Colours of tokens, shared by all images.

    Args:
      features: `[n, T, W]`, T a square.

    Returns:
      uint8 `[n, side, side, 3]`: the components of the tokens of all images together, each
      stretched over its central 98 %.
    """
    count, tokens, width = features.shape
    flat = features.reshape(-1, width).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    axes = np.linalg.eigh(flat.T @ flat).eigenvectors[:, ::-1][:, :3]
    # An eigenvector's sign is arbitrary: its largest entry is made positive.
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    components = flat @ axes
    low, high = np.percentile(components, [1, 99], axis=0)
    colours = np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1)
    side = round(tokens**0.5)
    return (255 * colours).astype(np.uint8).reshape(count, side, side, -1)


def feature_maps(
    tokenizer: api.PretrainedTokenizer, images: np.ndarray, layer: int = 1
) -> np.ndarray:
    """A picture: images of one class, and below them the maps of a decoder layer's features.

    Args:
      tokenizer: whose.
      images: uint8 `[n, S, S, 3]`.
      layer: of the decoder transformer.
    """
    features = np.asarray(tokenizer.decoder_features(tokenizer.encode(images), layer=layer))
    maps = component_maps(features)
    scale = images.shape[1] // maps.shape[1]
    maps = maps.repeat(scale, axis=1).repeat(scale, axis=2)
    return pictures.grid([images, maps])
