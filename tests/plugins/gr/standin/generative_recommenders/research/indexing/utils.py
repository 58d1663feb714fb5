"""Items in the order of their similarity."""


def get_top_k_module(top_k_method, model, item_embeddings, item_ids):
    assert top_k_method == "MIPSBruteForceTopK", top_k_method

    def all_sorted(query_embeddings):
        scores, order = (query_embeddings @ item_embeddings[0].T).sort(dim=1, descending=True)
        return scores, item_ids[0][order]

    return all_sorted
