-- Which sources does the model find hardest, and which fail most? The hardest come first.

CREATE OR REPLACE VIEW worst_sources AS
SELECT
    model,
    quantization,
    recipe_hash,
    corpus,
    source,
    language,
    cast(sum(documents) AS bigint) AS documents,
    cast(coalesce(sum(documents) FILTER (WHERE panel <> 'status/ok'), 0) AS bigint) AS failed,
    cast(sum(bytes) FILTER (WHERE panel = 'status/ok') AS bigint) AS bytes,
    sum(nll) FILTER (WHERE panel = 'status/ok') / ln(2)
    / nullif(sum(bytes) FILTER (WHERE panel = 'status/ok'), 0) AS bits_per_byte,
    exp(
        sum(nll) FILTER (WHERE panel = 'status/ok')
        / nullif(sum(tokens) FILTER (WHERE panel = 'status/ok'), 0)
    ) AS token_perplexity
FROM histograms
WHERE starts_with(panel, 'status/')
GROUP BY ALL
ORDER BY bits_per_byte DESC NULLS LAST;
