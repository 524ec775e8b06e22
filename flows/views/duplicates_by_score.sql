-- Which documents are copies of each other? Equal text has equal bits of every score, and texts
-- that differ hardly ever share length, tokens and log-likelihood to the last bit. A document that
-- several runs scored is one.

CREATE OR REPLACE VIEW duplicates_by_score AS
SELECT
    model,
    quantization,
    recipe_hash,
    corpus,
    num_bytes,
    num_tokens_scored,
    loglikelihood,
    count(DISTINCT doc_id) AS copies,
    (count(DISTINCT doc_id) - 1) * num_bytes AS bytes_to_spare,
    min(doc_id) AS first_doc_id,
    list(DISTINCT doc_id ORDER BY doc_id)[:10] AS doc_ids
FROM documents
GROUP BY model, quantization, recipe_hash, corpus, num_bytes, num_tokens_scored, loglikelihood
HAVING count(DISTINCT doc_id) > 1
ORDER BY bytes_to_spare DESC;
