"""The similarity function by its name."""

from ..rails.similarities.dot_product_similarity_fn import DotProductSimilarity


def get_similarity_function(module_type, query_embedding_dim, item_embedding_dim):
    assert module_type == "DotProduct", module_type
    assert query_embedding_dim == item_embedding_dim
    return DotProductSimilarity(), module_type
