-- How hard is each source, day by day? The line that a dashboard draws.

CREATE OR REPLACE VIEW by_day AS
SELECT
    model,
    quantization,
    recipe_hash,
    corpus,
    day,
    source,
    language,
    cast(sum(documents) AS bigint) AS documents,
    cast(sum(tokens) AS bigint) AS tokens,
    cast(sum(bytes) AS bigint) AS bytes,
    sum(nll) AS nll,
    sum(nll) / ln(2) / nullif(sum(bytes), 0) AS bits_per_byte
FROM histograms
WHERE panel = 'status/ok'
GROUP BY ALL
ORDER BY day;
