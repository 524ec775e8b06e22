-- Did a source's text become easier or harder in the seven days up to its corpus' newest, compared
-- with the seven before? `moved` is the Wasserstein distance of the two histograms in bits/byte.

CREATE OR REPLACE VIEW drift_this_week AS
WITH dated AS (
    SELECT
        *,
        max(day) OVER (PARTITION BY model, quantization, recipe_hash, corpus) AS newest
    FROM histograms
    WHERE panel IN ('status/ok', 'bits_per_byte')
),

weeks AS (
    SELECT
        *,
        day > newest - 7 AS is_new
    FROM dated
    WHERE day > newest - 14
),

sums AS (
    SELECT
        model,
        quantization,
        recipe_hash,
        corpus,
        source,
        language,
        newest,
        cast(coalesce(sum(documents) FILTER (WHERE is_new), 0) AS bigint) AS documents,
        cast(coalesce(sum(documents) FILTER (WHERE NOT is_new), 0) AS bigint)
            AS documents_before,
        sum(nll) FILTER (WHERE is_new) / ln(2) / nullif(sum(bytes) FILTER (WHERE is_new), 0)
            AS bits_per_byte,
        sum(nll) FILTER (WHERE NOT is_new) / ln(2) / nullif(sum(bytes) FILTER (WHERE NOT is_new), 0)
            AS bits_per_byte_before
    FROM weeks
    WHERE panel = 'status/ok'
    GROUP BY ALL
),

bins AS (
    SELECT
        model,
        quantization,
        recipe_hash,
        corpus,
        source,
        language,
        bin,
        coalesce(sum(documents) FILTER (WHERE is_new), 0) AS documents,
        coalesce(sum(documents) FILTER (WHERE NOT is_new), 0) AS documents_before
    FROM weeks
    WHERE panel = 'bits_per_byte'
    GROUP BY ALL
),

below AS (
    SELECT
        *,
        sum(documents) OVER up / nullif(sum(documents) OVER whole, 0)
        - sum(documents_before) OVER up / nullif(sum(documents_before) OVER whole, 0) AS apart,
        lead(bin, 1, bin) OVER up - bin AS width
    FROM bins
    WINDOW
        whole AS (PARTITION BY model, quantization, recipe_hash, corpus, source, language),
        up AS (PARTITION BY model, quantization, recipe_hash, corpus, source, language ORDER BY bin)
),

distances AS (
    SELECT
        model,
        quantization,
        recipe_hash,
        corpus,
        source,
        language,
        sum(abs(apart) * width) * 0.02 AS moved
    FROM below
    GROUP BY ALL
)

SELECT
    s.*,
    s.bits_per_byte - s.bits_per_byte_before AS change,
    d.moved
FROM sums AS s
LEFT JOIN distances AS d
    ON
        s.model = d.model
        AND s.quantization IS NOT DISTINCT FROM d.quantization
        AND s.recipe_hash = d.recipe_hash
        AND s.corpus = d.corpus
        AND s.source = d.source
        AND s.language = d.language
ORDER BY abs(change) DESC NULLS LAST;
