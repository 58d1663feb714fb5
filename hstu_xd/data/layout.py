"""Names and version of the files in a prepared store."""

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CATALOG = "catalog.parquet"
USERS = "users.parquet"
OFFSETS = "offsets.npy"
ITEM_IDS = "item_ids.npy"
TIMESTAMPS = "timestamps.npy"
DATA_FILES = (CATALOG, USERS, OFFSETS, ITEM_IDS, TIMESTAMPS)
