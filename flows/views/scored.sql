-- What the questions are asked of: of runs that scored the same in the same way, the latest.
-- Answers tell models apart by name, so that a checkpoint stands in for the last one of its name.

CREATE OR REPLACE VIEW current_runs AS
SELECT *
FROM runs
QUALIFY
    row_number() OVER (
        PARTITION BY model, corpus, quantization, dtype, recipe_hash, corpus_fingerprint
        ORDER BY date DESC, run_key ASC
    ) = 1;

-- The histograms of these. `day` is the document's where it has one, else the run's: runs of
-- earlier versions do not have the column at all.
CREATE OR REPLACE VIEW histograms AS
SELECT
    c.model,
    r.quantization,
    r.recipe_hash,
    c.corpus,
    c.run_key,
    c.source,
    c.language,
    c.panel,
    c.bin,
    c.documents,
    c.tokens,
    c.bytes,
    c.nll,
    c.value,
    c.hits,
    coalesce(try_cast(c.day AS date), c.date) AS day
FROM (
    SELECT *
    FROM counts
    UNION ALL BY NAME
    SELECT cast(NULL AS varchar) AS day
    WHERE FALSE
) AS c
INNER JOIN current_runs AS r ON c.run_key = r.run_key;

-- The documents of these that have scores.
CREATE OR REPLACE VIEW documents AS
SELECT
    r.quantization,
    s.* EXCLUDE (day),
    coalesce(try_cast(s.day AS date), s.date) AS day
FROM (
    SELECT *
    FROM scores
    UNION ALL BY NAME
    SELECT cast(NULL AS varchar) AS day
    WHERE FALSE
) AS s
INNER JOIN current_runs AS r ON s.run_key = r.run_key
WHERE s.status = 'ok';
