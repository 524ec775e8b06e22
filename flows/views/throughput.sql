-- How fast was a run, how busy were its devices, and what does it take up? `hours` times the price
-- of a device's hour is what it cost; what it is to be stored goes by `bytes_written`. `retries`
-- are attempts at shards that failed or were lost; older runs do not say.

CREATE OR REPLACE VIEW throughput AS
WITH shards_done AS (
    -- Tables that were published before receipts knew of attempts have no such column.
    SELECT cast(NULL AS integer) AS attempt
    WHERE FALSE
    UNION ALL BY NAME
    SELECT * FROM shards
)

SELECT
    r.model,
    r.quantization,
    r.corpus,
    r.date,
    r.run_key,
    s.device,
    count(*) AS shards,
    cast(sum(s.attempt - 1) AS bigint) AS retries,
    cast(sum(s.tokens) AS bigint) AS tokens,
    cast(sum(s.documents) AS bigint) AS documents,
    sum(s.seconds) / 3600 AS hours,
    sum(s.tokens) / nullif(sum(s.seconds), 0) AS tokens_per_second,
    sum(s.device_seconds) / nullif(sum(s.seconds), 0) AS device_busy,
    sum(s.seconds) / 3600 * 1e9 / nullif(sum(s.tokens), 0) AS hours_per_billion_tokens,
    cast(sum(s.bytes_written) AS bigint) AS bytes_written,
    sum(s.bytes_written) / nullif(sum(s.tokens), 0) AS bytes_per_token
FROM shards_done AS s
INNER JOIN runs AS r ON s.run_key = r.run_key
GROUP BY ALL
ORDER BY r.date DESC, r.run_key;
