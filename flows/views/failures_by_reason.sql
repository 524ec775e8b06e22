-- Which documents have no scores, and why? The most frequent reason comes first.

CREATE OR REPLACE VIEW failures_by_reason AS
SELECT
    model,
    corpus,
    source,
    language,
    substr(panel, 8) AS status,
    cast(sum(documents) AS bigint) AS documents
FROM histograms
WHERE starts_with(panel, 'status/') AND panel <> 'status/ok'
GROUP BY ALL
ORDER BY documents DESC;
