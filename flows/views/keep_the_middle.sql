-- Which documents lie between the 30th and the 60th percentile of bits/byte of their language in a
-- corpus? CCNet's cut (arXiv 1911.00359); the view buckets has head, middle and tail. A percentile
-- is the score of a document, as for `logitmill filter`.

CREATE OR REPLACE VIEW buckets AS
WITH cuts AS (
    SELECT
        model,
        quantization,
        recipe_hash,
        corpus,
        language,
        quantile_disc(bits_per_byte, 0.3) AS cut_30,
        quantile_disc(bits_per_byte, 0.6) AS cut_60
    FROM documents
    GROUP BY ALL
)

SELECT
    d.model,
    d.quantization,
    d.recipe_hash,
    d.corpus,
    d.run_key,
    d.day,
    d.source,
    d.language,
    d.doc_id,
    d.num_bytes,
    d.bits_per_byte,
    CASE
        WHEN d.bits_per_byte < c.cut_30 THEN 'head'
        WHEN d.bits_per_byte < c.cut_60 THEN 'middle'
        ELSE 'tail'
    END AS bucket
FROM documents AS d
INNER JOIN cuts AS c
    ON
        d.model = c.model
        AND d.quantization IS NOT DISTINCT FROM c.quantization
        AND d.recipe_hash = c.recipe_hash
        AND d.corpus = c.corpus
        AND d.language = c.language
WHERE d.bits_per_byte IS NOT NULL;

CREATE OR REPLACE VIEW keep_the_middle AS
SELECT * EXCLUDE (bucket)
FROM buckets
WHERE bucket = 'middle';

-- How much each bucket holds.
CREATE OR REPLACE VIEW bucket_sizes AS
SELECT
    model,
    quantization,
    recipe_hash,
    corpus,
    language,
    bucket,
    count(*) AS documents,
    cast(sum(num_bytes) AS bigint) AS bytes,
    max(bits_per_byte) AS highest_bits_per_byte
FROM buckets
GROUP BY ALL
ORDER BY model, corpus, language, bucket;
