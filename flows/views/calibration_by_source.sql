-- Where is the model surer, or less sure, than it is right? `ece` is the expected calibration error
-- of its most probable token over 20 bins (arXiv 1706.04599), 0 at best.

CREATE OR REPLACE VIEW calibration_by_source AS
WITH bins AS (
    SELECT
        model,
        quantization,
        recipe_hash,
        corpus,
        source,
        bin,
        sum(tokens) AS tokens,
        sum(value) AS confidence,
        sum(hits) AS hits
    FROM histograms
    WHERE panel = 'calibration'
    GROUP BY ALL
)

SELECT
    model,
    quantization,
    recipe_hash,
    corpus,
    source,
    cast(sum(tokens) AS bigint) AS tokens,
    sum(confidence) / sum(tokens) AS confidence,
    sum(hits) / sum(tokens) AS accuracy,
    sum(abs(confidence - hits)) / sum(tokens) AS ece
FROM bins
GROUP BY ALL
ORDER BY ece DESC;
