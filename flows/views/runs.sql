-- What the complete runs below a folder hold, by their manifests: the tables that `logitmill
-- publish` makes, without a catalog. `SET VARIABLE root = 's3://scores/runs';` comes first.

CREATE OR REPLACE VIEW manifests AS
SELECT
    content,
    regexp_replace(filename, '/manifest\.json$', '') AS folder,
    cast(last_modified AT TIME ZONE 'UTC' AS date) AS date
FROM read_text(getvariable('root') || '/*/manifest.json');

CREATE OR REPLACE VIEW plans AS
SELECT
    content,
    regexp_replace(filename, '/plan\.json$', '') AS folder
FROM read_text(getvariable('root') || '/*/plan.json');

CREATE OR REPLACE VIEW receipts AS
SELECT
    content,
    regexp_replace(filename, '/shards/\d+\.json$', '') AS folder
FROM read_text(getvariable('root') || '/*/shards/*.json');

-- A row a run.
CREATE OR REPLACE VIEW runs AS
WITH spent AS (
    SELECT
        folder,
        count(*) AS shards,
        sum(cast(content -> '$.seconds' AS double)) AS seconds,
        sum(coalesce(cast(content -> '$.device_seconds' AS double), 0)) AS device_seconds
    FROM receipts
    GROUP BY folder
)

SELECT
    m.content ->> '$.model.name' AS model,
    regexp_replace(
        regexp_replace(p.content ->> '$.uri', '\d{4}-\d{2}-\d{2}', '*', 'g'),
        '/\d{4}/\d{2}/\d{2}/', '/*/', 'g'
    ) AS corpus,
    m.date,
    m.content ->> '$.run_key' AS run_key,
    m.folder AS uri,
    m.content ->> '$.model.digest' AS model_digest,
    m.content ->> '$.model.architecture' AS architecture,
    p.content ->> '$.quantization' AS quantization,
    m.content ->> '$.engine.dtype' AS dtype,
    p.content ->> '$.device' AS device,
    m.content ->> '$.recipe.name' AS recipe,
    m.content ->> '$.recipe_hash' AS recipe_hash,
    from_json(m.content -> '$.tiers', '["VARCHAR"]') AS tiers,
    p.content ->> '$.uri' AS corpus_uri,
    m.content ->> '$.corpus_fingerprint' AS corpus_fingerprint,
    t.shards,
    cast(m.content -> '$.documents' AS bigint) AS documents,
    cast(m.content -> '$.failed' AS bigint) AS failed,
    cast(m.content -> '$.tokens' AS bigint) AS tokens,
    cast(m.content -> '$.bytes' AS bigint) AS bytes,
    cast(m.content -> '$.loglikelihood' AS double) AS loglikelihood,
    t.seconds,
    t.device_seconds,
    cast(list_sum(cast(m.content -> '$.parts[*].bytes' AS bigint[])) AS bigint) AS bytes_written
FROM manifests AS m
INNER JOIN plans AS p ON m.folder = p.folder
LEFT JOIN spent AS t ON m.folder = t.folder;

-- A row a file of a run.
CREATE OR REPLACE VIEW parts AS
WITH listed AS (
    SELECT
        content ->> '$.run_key' AS run_key,
        folder,
        unnest(
            from_json(
                content -> '$.parts', '[{"name": "VARCHAR", "bytes": "BIGINT", "shard": "INTEGER"}]'
            )
        ) AS part
    FROM manifests
)

SELECT
    listed.run_key,
    listed.folder || '/' || part.name AS path,
    part.shard,
    split_part(part.name, '/', 1) AS tier,
    part.bytes
FROM listed;

-- A row a shard of a run, from the receipts.
CREATE OR REPLACE VIEW shards AS
WITH written AS (
    SELECT
        run_key,
        shard,
        cast(sum(bytes) AS bigint) AS bytes_written,
        coalesce(cast(sum(bytes) FILTER (WHERE tier = 'hidden') AS bigint), 0)
            AS bytes_hidden,
        coalesce(cast(sum(bytes) FILTER (WHERE tier = 'lens') AS bigint), 0)
            AS bytes_lens,
        coalesce(cast(sum(bytes) FILTER (WHERE tier = 'logits') AS bigint), 0)
            AS bytes_logits,
        coalesce(cast(sum(bytes) FILTER (WHERE tier = 'sampled') AS bigint), 0)
            AS bytes_sampled,
        coalesce(cast(sum(bytes) FILTER (WHERE tier = 'scores') AS bigint), 0)
            AS bytes_scores,
        coalesce(cast(sum(bytes) FILTER (WHERE tier = 'shards') AS bigint), 0)
            AS bytes_summary,
        coalesce(cast(sum(bytes) FILTER (WHERE tier = 'tokens') AS bigint), 0)
            AS bytes_tokens,
        coalesce(cast(sum(bytes) FILTER (WHERE tier = 'topk') AS bigint), 0)
            AS bytes_topk
    FROM parts
    GROUP BY run_key, shard
)

SELECT
    r.model,
    r.corpus,
    r.date,
    r.run_key,
    cast(s.content -> '$.shard' AS integer) AS shard,
    s.content ->> '$.device' AS device,
    cast(s.content -> '$.seconds' AS double) AS seconds,
    coalesce(cast(s.content -> '$.device_seconds' AS double), 0) AS device_seconds,
    cast(s.content -> '$.documents' AS bigint) AS documents,
    cast(s.content -> '$.failed' AS bigint) AS failed,
    cast(s.content -> '$.tokens' AS bigint) AS tokens,
    cast(s.content -> '$.bytes' AS bigint) AS bytes,
    w.bytes_written,
    cast(s.content -> '$.attempt' AS integer) AS attempt,
    w.* EXCLUDE (run_key, shard, bytes_written)
FROM receipts AS s
INNER JOIN runs AS r ON s.folder = r.uri
INNER JOIN written AS w
    ON r.run_key = w.run_key AND cast(s.content -> '$.shard' AS integer) = w.shard;

-- A row a bin of a histogram of a run.
CREATE OR REPLACE VIEW counts AS
SELECT
    r.model,
    r.corpus,
    r.date,
    r.run_key,
    c.* EXCLUDE (filename)
FROM
    read_parquet(
        getvariable('root') || '/*/summary/counts.parquet',
        union_by_name = TRUE,
        filename = TRUE
    ) AS c
INNER JOIN runs AS r ON c.filename = r.uri || '/summary/counts.parquet';

-- A row a document of a run.
CREATE OR REPLACE VIEW scores AS
SELECT
    r.model,
    r.corpus,
    r.date,
    r.run_key,
    s.* EXCLUDE (filename)
FROM
    read_parquet(
        getvariable('root') || '/*/scores/*.parquet', union_by_name = TRUE, filename = TRUE
    ) AS s
INNER JOIN parts AS p ON s.filename = p.path
INNER JOIN runs AS r ON p.run_key = r.run_key;
