/* Domain attention with SiLU on a CPU, group by group and without padding of the batch.
 *
 * A group's keys and values are packed once, head by head, keys in columns: as many keys as there
 * are lanes are one vector. A few queries at a time walk over them. Heads share the bias, which is
 * looked up once for a block of queries. Nothing is kept for the backward pass but the inputs.
 */

#include "../vectors.h"

/* Queries that share a look-up of the bias; keys of a stretch. */
enum { BLOCK = 16, STRETCH = 64 };
/* Pieces of work. Their number is fixed, so that sums over them do not depend on the threads. */
enum { PIECES = 32 };
/* Sums that are kept side by side where additions would wait for one another. */
enum { SUMS = 4 };

/* Fields of eight bytes each, pointers first; native.py has the same list. */
typedef struct {
    /* What is read: (tokens, heads * width) floats, rows that lie a stride apart. */
    const float *q, *k, *v, *grad_out;
    /* Rows by group, positions rising, and the position of every row in its history. Queries may be
     * fewer than keys: both have rows of their own. */
    const int64_t *query_tokens, *query_offsets, *key_tokens, *key_offsets, *query_places, *places;
    /* Tables of the bias and what every row has of it, the last of queries; no tables: NULL. */
    const float *position_weights, *time_weights;
    const int64_t *query_positions, *positions, *timestamps, *next_timestamps;
    const int32_t *edges;
    /* What is written: (tokens, heads * width), and sums of the tables' gradients. */
    float *out, *dq, *dk, *dv_out;
    double *position_sums, *time_sums;
    int64_t q_stride, k_stride, v_stride, grad_out_stride;
    int64_t heads, dqk, dv, groups, max_length, last_bucket, norm_length, threads;
} Attention;

/* The part of a group's work that lies in scratch memory. */
typedef struct {
    const Attention *a;
    const int64_t *queries, *keys;
    int64_t num_queries, num_keys;
    int64_t wide;           /* num_keys, rounded up */
    int64_t dqk, dv;        /* widths of a packed row, rounded up */
    float *key_columns;     /* (heads, dqk, wide) */
    float *value_columns;   /* (heads, dv, wide), backward */
    float *rows;            /* (heads, wide, dqk or dv): values forward, keys backward */
    float *dk_columns, *dv_columns; /* as key_columns and value_columns */
    float *bias, *dbias;    /* (BLOCK, wide) */
    int32_t *buckets;       /* (BLOCK, wide) */
    int64_t *key_times;     /* (wide,) */
    int32_t *key_positions; /* (wide,) */
    double *position_sums, *time_sums; /* of the piece */
} Group;

/* Lays rows of tokens into columns: (n tokens, width) -> (width, wide). */
static void pack_columns(const float *from, int64_t stride, const int64_t *tokens, int64_t n, int64_t width,
                         int64_t wide, float *to) {
    for (int64_t j = 0; j < wide; j += LANES)
        for (int64_t c = 0; c < width; c += LANES) {
            floats square[LANES];
            for (int64_t i = 0; i < LANES; i++)
                square[i] = j + i < n ? load_some(from + tokens[j + i] * stride + c, width - c) : splat(0);
            transpose(square);
            for (int64_t i = 0; i < smaller(LANES, width - c); i++) store(to + (c + i) * wide + j, square[i]);
        }
}

static void unpack_columns(const float *from, int64_t wide, const int64_t *tokens, int64_t n, int64_t width,
                           float *to, int64_t stride) {
    for (int64_t j = 0; j < n; j += LANES)
        for (int64_t c = 0; c < width; c += LANES) {
            floats square[LANES];
            for (int64_t i = 0; i < LANES; i++)
                square[i] = c + i < width ? load(from + (c + i) * wide + j) : splat(0);
            transpose(square);
            for (int64_t i = 0; i < smaller(LANES, n - j); i++)
                store_some(to + tokens[j + i] * stride + c, square[i], width - c);
        }
}

/* Lays rows of tokens one behind the other, padded with zeros: (n, width) -> (height, padded). */
static void pack_rows(const float *from, int64_t stride, const int64_t *tokens, int64_t n, int64_t width,
                      int64_t padded, int64_t height, float *to) {
    if (n < height || width < padded) clear(to, height * padded);
    for (int64_t j = 0; j < n; j++) copy(to + j * padded, from + tokens[j] * stride, width);
}

/* columns[.][j] += sum_r weights[r][j] rows[r]. */
static inline void add_outer(float weights[ROWS][STRETCH], const float *rows, int64_t padded, float *columns,
                             int64_t width, int64_t wide, int64_t n) {
    for (int64_t j = 0; j < n; j += LANES) {
        floats weight[ROWS];
        for (int r = 0; r < ROWS; r++) weight[r] = load(&weights[r][j]);
        for (int64_t c = 0; c < width; c++) {
            floats total = load(columns + c * wide + j);
            for (int r = 0; r < ROWS; r++) total += splat(rows[r * padded + c]) * weight[r];
            store(columns + c * wide + j, total);
        }
    }
}

/* Counts the leading keys that each query of a block sees: those not later than itself. */
static int64_t count_seen(const Group *group, int64_t first, int64_t rows, int64_t before, int32_t seen[BLOCK]) {
    const int64_t *places = group->a->places;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t place = group->a->query_places[group->queries[first + r]];
        while (before < group->num_keys && places[group->keys[before]] <= place) before++;
        seen[r] = (int32_t)before;
    }
    for (int64_t r = rows; r < BLOCK; r++) seen[r] = 0;
    return before;
}

/* Looks the bias of a block of queries up, for all keys that one of them sees. */
static void look_up(const Group *group, int64_t first, int64_t rows, int64_t seen) {
    const Attention *a = group->a;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t token = group->queries[first + r];
        float *bias = group->bias + r * group->wide;
        if (!a->position_weights) {
            clear(bias, round_up(seen));
            continue;
        }
        const int32_t shift = (int32_t)(a->max_length - 1 - a->query_positions[token]);
        const int64_t time = a->next_timestamps[token];
        for (int64_t j = 0; j < seen; j += LANES) {
            int64_t difference[LANES];
            for (int lane = 0; lane < LANES; lane++) difference[lane] = time - group->key_times[j + lane];
            const ints bucket = time_bucket(difference, a->edges, (int32_t)a->last_bucket);
            *(ints *)(group->buckets + r * group->wide + j) = bucket;
            const ints place = *(const ints *)(group->key_positions + j) + splat_int(shift);
            floats found;
            for (int lane = 0; lane < LANES; lane++)
                found[lane] = a->position_weights[place[lane]] + a->time_weights[bucket[lane]];
            store(bias + j, found);
        }
    }
}

/* Adds a block's gradients of biases to those of the tables. */
static void add_to_tables(const Group *group, int64_t first, int64_t rows, const int32_t seen[BLOCK]) {
    const Attention *a = group->a;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t shift = a->max_length - 1 - a->query_positions[group->queries[first + r]];
        const float *dbias = group->dbias + r * group->wide;
        const int32_t *buckets = group->buckets + r * group->wide;
        double *sums = group->position_sums + shift;
        /* Neighbours often share a bucket. */
        for (int64_t j = 0; j < seen[r]; j++) {
            sums[group->key_positions[j]] += dbias[j];
            group->time_sums[SUMS * buckets[j] + j % SUMS] += dbias[j];
        }
    }
}

static void describe_keys(const Group *group) {
    const Attention *a = group->a;
    for (int64_t j = 0; j < group->wide; j++) {
        /* Columns of padding are looked up as the last key, and not seen. */
        const int64_t token = group->keys[j < group->num_keys ? j : group->num_keys - 1];
        group->key_times[j] = a->timestamps[token];
        group->key_positions[j] = (int32_t)a->positions[token];
    }
}

/* Attends ROWS queries of one head, from row r0 of a block on, to the keys that they see. */
static void attend_rows(const Group *group, int64_t head, const float *queries, int64_t r0, const int32_t *seen,
                        float *totals) {
    const Attention *a = group->a;
    const float *columns = group->key_columns + head * a->dqk * group->wide;
    const float *values = group->rows + head * group->wide * group->dv;
    float weights[ROWS][STRETCH];
    int32_t most = 0;
    for (int r = 0; r < ROWS; r++) most = seen[r0 + r] > most ? seen[r0 + r] : most;
    for (int64_t start = 0; start < most; start += STRETCH) {
        const int64_t n = smaller(STRETCH, most - start);
        multiply(queries, group->dqk, columns + start, a->dqk, group->wide, n, weights[0], STRETCH);
        for (int r = 0; r < ROWS; r++) {
            const float *bias = group->bias + (r0 + r) * group->wide + start;
            for (int64_t j = 0; j < n; j += LANES) {
                const floats score = load(&weights[r][j]) + load(bias + j);
                const floats weight = score / (splat(1.0f) + exponential(-score));
                store(&weights[r][j], keep(lanes_from((int32_t)(start + j)) < splat_int(seen[r0 + r]), weight));
            }
        }
        add_rows(weights[0], STRETCH, values + start * group->dv, group->dv, n, totals);
    }
}

/* Takes ROWS queries of one head back through attend_rows. */
static void return_rows(const Group *group, int64_t head, const float *queries, const float *grads, int64_t r0,
                        const int32_t *seen, float *dq) {
    const Attention *a = group->a;
    const int64_t of_keys = head * a->dqk * group->wide, of_values = head * a->dv * group->wide;
    const float *keys = group->rows + head * group->wide * group->dqk;
    float weights[ROWS][STRETCH], slopes[ROWS][STRETCH];
    int32_t most = 0;
    for (int r = 0; r < ROWS; r++) most = seen[r0 + r] > most ? seen[r0 + r] : most;
    for (int64_t start = 0; start < most; start += STRETCH) {
        const int64_t n = smaller(STRETCH, most - start);
        multiply(queries, group->dqk, group->key_columns + of_keys + start, a->dqk, group->wide, n, weights[0],
                 STRETCH);
        multiply(grads, group->dv, group->value_columns + of_values + start, a->dv, group->wide, n, slopes[0],
                 STRETCH);
        for (int r = 0; r < ROWS; r++) {
            const float *bias = group->bias + (r0 + r) * group->wide + start;
            float *dbias = group->dbias + (r0 + r) * group->wide + start;
            for (int64_t j = 0; j < n; j += LANES) {
                const ints mask = lanes_from((int32_t)(start + j)) < splat_int(seen[r0 + r]);
                const floats score = load(&weights[r][j]) + load(bias + j);
                const floats gate = splat(1.0f) / (splat(1.0f) + exponential(-score));
                const floats weight = score * gate;
                const floats slope = load(&slopes[r][j]) * (gate + weight * (splat(1.0f) - gate));
                store(&weights[r][j], keep(mask, weight));
                store(&slopes[r][j], keep(mask, slope));
                store(dbias + j, load(dbias + j) + keep(mask, slope));
            }
        }
        add_rows(slopes[0], STRETCH, keys + start * group->dqk, group->dqk, n, dq);
        add_outer(slopes, queries, group->dqk, group->dk_columns + of_keys + start, a->dqk, group->wide, n);
        add_outer(weights, grads, group->dv, group->dv_columns + of_values + start, a->dv, group->wide, n);
    }
}

static void attend_block(const Group *group, int64_t first, int64_t rows, const int32_t seen[BLOCK], float *memory) {
    const Attention *a = group->a;
    float *queries = memory, *totals = memory + BLOCK * group->dqk;
    for (int64_t head = 0; head < a->heads; head++) {
        pack_rows(a->q + head * a->dqk, a->q_stride, group->queries + first, rows, a->dqk, group->dqk, BLOCK, queries);
        clear(totals, BLOCK * group->dv);
        for (int64_t r = 0; r < rows; r += ROWS)
            attend_rows(group, head, queries + r * group->dqk, r, seen, totals + r * group->dv);
        for (int64_t r = 0; r < rows; r++) {
            float *out = a->out + (group->queries[first + r] * a->heads + head) * a->dv;
            for (int64_t c = 0; c < a->dv; c++) out[c] = totals[r * group->dv + c] / (float)a->norm_length;
        }
    }
}

static void return_block(const Group *group, int64_t first, int64_t rows, const int32_t seen[BLOCK], float *memory) {
    const Attention *a = group->a;
    float *queries = memory, *grads = queries + BLOCK * group->dqk, *dq = grads + BLOCK * group->dv;
    clear(group->dbias, BLOCK * group->wide);
    for (int64_t head = 0; head < a->heads; head++) {
        pack_rows(a->q + head * a->dqk, a->q_stride, group->queries + first, rows, a->dqk, group->dqk, BLOCK, queries);
        pack_rows(a->grad_out + head * a->dv, a->grad_out_stride, group->queries + first, rows, a->dv, group->dv, BLOCK,
                  grads);
        for (int64_t i = 0; i < BLOCK * group->dv; i++) grads[i] /= (float)a->norm_length;
        clear(dq, BLOCK * group->dqk);
        for (int64_t r = 0; r < rows; r += ROWS)
            return_rows(group, head, queries + r * group->dqk, grads + r * group->dv, r, seen, dq + r * group->dqk);
        for (int64_t r = 0; r < rows; r++)
            copy(a->dq + (group->queries[first + r] * a->heads + head) * a->dqk, dq + r * group->dqk, a->dqk);
    }
    if (a->position_weights) add_to_tables(group, first, rows, seen);
}

/* Finds room for a group and packs its keys and values; returns room for a block. */
static float *prepare(Group *group, Scratch *scratch, int backward) {
    const Attention *a = group->a;
    const int64_t wide = group->wide = round_up(group->num_keys);
    group->dqk = round_up(a->dqk);
    group->dv = round_up(a->dv);
    const int64_t columns = a->heads * wide * (a->dqk + (backward ? a->dqk + 2 * a->dv : 0));
    const int64_t rows = a->heads * wide * (backward ? group->dqk : group->dv);
    const int64_t block = BLOCK * 2 * (group->dqk + group->dv);
    float *at = reserve(scratch, columns + rows + block + 3 * BLOCK * wide + 3 * wide + LANES);
    group->key_times = (int64_t *)at, at += 2 * wide;
    group->key_positions = (int32_t *)at, at += wide;
    group->bias = at, at += BLOCK * wide;
    group->dbias = at, at += BLOCK * wide;
    group->buckets = (int32_t *)at, at += BLOCK * wide;
    group->rows = at, at += rows;
    group->key_columns = at, at += a->heads * a->dqk * wide;
    if (backward) {
        group->value_columns = at, at += a->heads * a->dv * wide;
        group->dk_columns = at, at += a->heads * a->dqk * wide;
        group->dv_columns = at, at += a->heads * a->dv * wide;
        clear(group->dk_columns, a->heads * (a->dqk + a->dv) * wide);
    }
    if (a->position_weights) describe_keys(group);
    for (int64_t head = 0; head < a->heads; head++) {
        const float *k = a->k + head * a->dqk, *v = a->v + head * a->dv;
        const int64_t n = group->num_keys;
        pack_columns(k, a->k_stride, group->keys, n, a->dqk, wide, group->key_columns + head * a->dqk * wide);
        if (backward) {
            pack_columns(v, a->v_stride, group->keys, n, a->dv, wide, group->value_columns + head * a->dv * wide);
            pack_rows(k, a->k_stride, group->keys, n, a->dqk, group->dqk, wide, group->rows + head * wide * group->dqk);
        } else
            pack_rows(v, a->v_stride, group->keys, n, a->dv, group->dv, wide, group->rows + head * wide * group->dv);
    }
    return at;
}

/* Writes zeros for tokens of a group in which nobody reads or nothing is read. */
static void clear_rows(float *to, int64_t width, const int64_t *tokens, int64_t n) {
    for (int64_t i = 0; i < n; i++) memset(to + tokens[i] * width, 0, width * sizeof(float));
}

static void compute_group(Group *group, Scratch *scratch, int backward) {
    const Attention *a = group->a;
    if (!group->num_queries || !group->num_keys) {
        clear_rows(backward ? a->dq : a->out, a->heads * (backward ? a->dqk : a->dv), group->queries, group->num_queries);
        if (backward) {
            clear_rows(a->dk, a->heads * a->dqk, group->keys, group->num_keys);
            clear_rows(a->dv_out, a->heads * a->dv, group->keys, group->num_keys);
        }
        return;
    }
    float *memory = prepare(group, scratch, backward);
    int32_t seen[BLOCK];
    int64_t before = 0;
    for (int64_t first = 0; first < group->num_queries; first += BLOCK) {
        const int64_t rows = smaller(BLOCK, group->num_queries - first);
        before = count_seen(group, first, rows, before, seen);
        look_up(group, first, rows, before);
        (backward ? return_block : attend_block)(group, first, rows, seen, memory);
    }
    if (!backward) return;
    for (int64_t head = 0; head < a->heads; head++) {
        const int64_t n = group->num_keys, wide = group->wide;
        unpack_columns(group->dk_columns + head * a->dqk * wide, wide, group->keys, n, a->dqk, a->dk + head * a->dqk,
                       a->heads * a->dqk);
        unpack_columns(group->dv_columns + head * a->dv * wide, wide, group->keys, n, a->dv, a->dv_out + head * a->dv,
                       a->heads * a->dv);
    }
}

static int64_t queries_of(const Attention *a, int64_t g) { return a->query_offsets[g + 1] - a->query_offsets[g]; }
static int64_t keys_of(const Attention *a, int64_t g) { return a->key_offsets[g + 1] - a->key_offsets[g]; }
static int64_t work_of(const Attention *a, int64_t g) {
    return (queries_of(a, g) + LANES) * (keys_of(a, g) + LANES);
}

/* Cuts the groups into pieces of about the same work. */
static void cut(const Attention *a, int64_t first_group[PIECES + 1]) {
    int64_t all = 0, done = 0, piece = 0;
    for (int64_t g = 0; g < a->groups; g++) all += work_of(a, g);
    for (int64_t g = 0; g < a->groups; g++) {
        while (piece <= PIECES && done * PIECES >= piece * all) first_group[piece++] = g;
        done += work_of(a, g);
    }
    while (piece <= PIECES) first_group[piece++] = a->groups;
    first_group[PIECES] = a->groups;
}

static void compute(const Attention *a, int backward) {
    int64_t first_group[PIECES + 1];
    cut(a, first_group);
    const int64_t positions = 2 * a->max_length - 1, buckets = a->last_bucket + 1;
    const int with_tables = backward && a->position_weights != NULL;
    const int64_t sums = with_tables ? positions + SUMS * buckets : 0;
    double *all_sums = with_tables ? calloc(PIECES * sums, sizeof(double)) : NULL;
    if (with_tables && !all_sums) abort();
#pragma omp parallel num_threads((int)a->threads)
    {
        Scratch scratch = {NULL, 0};
#pragma omp for schedule(dynamic)
        for (int piece = 0; piece < PIECES; piece++) {
            Group group = {.a = a};
            if (with_tables) {
                group.position_sums = all_sums + piece * sums;
                group.time_sums = group.position_sums + positions;
            }
            for (int64_t g = first_group[piece]; g < first_group[piece + 1]; g++) {
                group.queries = a->query_tokens + a->query_offsets[g];
                group.keys = a->key_tokens + a->key_offsets[g];
                group.num_queries = queries_of(a, g);
                group.num_keys = keys_of(a, g);
                compute_group(&group, &scratch, backward);
            }
        }
        free(scratch.at);
    }
    for (int piece = 0; with_tables && piece < PIECES; piece++) {
        const double *of_positions = all_sums + piece * sums, *of_times = of_positions + positions;
        for (int64_t i = 0; i < positions; i++) a->position_sums[i] += of_positions[i];
        for (int64_t i = 0; i < SUMS * buckets; i++) a->time_sums[i / SUMS] += of_times[i];
    }
    free(all_sums);
}

void hstu_xd_attend(const Attention *a) { compute(a, 0); }
void hstu_xd_attend_backward(const Attention *a) { compute(a, 1); }
