/* DDSR's attention on a CPU: walks over each history once and holds the states that can be seen.
 *
 * A state lies in a slot. A user begins with a slot a domain, of its initial state, and gets others
 * as a domain is visited, up to M of each: what nobody visits costs one slot. A token's state takes
 * the place of the oldest one of its domain, then the token asks all slots in use. Going back, the
 * gradients of a state are summed in its slot until it is replaced, so that they are written once.
 */

#include "../vectors.h"

#include <math.h>

/* Pieces of work. Their number is fixed, so that sums over them do not depend on the threads. */
enum { PIECES = 32 };
/* Sums that are kept side by side where additions would wait for one another. */
enum { SUMS = 4 };

/* Fields of eight bytes each, pointers first; native.py has the same list. */
typedef struct {
    /* (rows, heads * width) floats, a stride apart: of queries; of keys and values of states, which
     * have a row more for the initial state of each domain. */
    const float *q, *k, *v, *grad_out;
    const int64_t *offsets;
    const int64_t *query_of; /* row of each token in q, out and dq; -1: it asks nothing */
    const int64_t *state_of; /* row of each token's state in k, v, dk and dv; -1: nobody reads it */
    const int64_t *domains, *timestamps, *next_timestamps;
    const float *bias; /* (never_written + 1, heads), or NULL */
    const int32_t *edges;
    /* What is written: as q, k and v, and a sum of the gradients of the bias. */
    float *out, *dq, *dk, *dv_out;
    double *bias_sums;
    int64_t q_stride, k_stride, v_stride, grad_out_stride;
    int64_t tokens, states, heads, dqk, dv, users, num_domains, states_per_domain, never_written, threads;
} States;

/* What a user's slots hold; a slot's lanes lie beside those of its neighbours. */
typedef struct {
    const States *s;
    int64_t used, wide;     /* slots in use, and at most, rounded up */
    int64_t dqk, dv;        /* widths of a packed row, rounded up */
    float *key_columns;     /* (heads, dqk, wide) */
    float *value_columns;   /* (heads, dv, wide), backward */
    float *rows;            /* (heads, wide, dqk or dv): values forward, keys backward */
    float *dk, *dv_rows;    /* (heads, wide, dqk) and (heads, wide, dv), backward */
    float *bias;            /* (heads, never_written + 1) */
    float *weights, *slopes; /* (heads, wide) */
    float *totals;          /* (heads,) */
    int64_t *written;       /* (wide,) time of a state */
    int32_t *ages;          /* (wide,) */
    int64_t *state_of;      /* (wide,) row of the state; -1 in a slot that is new */
    int64_t *slot_of;       /* (num_domains, states_per_domain), -1: none yet */
    int32_t *is_seen;       /* (wide,) all bits set, or none: the slot is not in use */
    int64_t *visits;        /* (num_domains,) */
    float *initial;         /* (num_domains, heads * (dqk + dv)): gradients of initial states */
    double *bias_sums;      /* of the piece */
} Slots;

/* Where a state's head begins in what is kept of it, see Slots. */
static inline float *of_head(float *rows, const Slots *x, int64_t head, int64_t slot, int64_t width) {
    return rows + (head * x->wide + slot) * width;
}

/* Puts a row of keys and values into a slot. */
static void put(Slots *x, int64_t slot, int64_t row, int backward) {
    const States *s = x->s;
    x->state_of[slot] = row;
    x->is_seen[slot] = -1;
    for (int64_t head = 0; head < s->heads; head++) {
        const float *k = s->k + row * s->k_stride + head * s->dqk;
        const float *v = s->v + row * s->v_stride + head * s->dv;
        float *columns = x->key_columns + head * s->dqk * x->wide + slot;
        for (int64_t c = 0; c < s->dqk; c++) columns[c * x->wide] = k[c];
        if (!backward) {
            copy(of_head(x->rows, x, head, slot, x->dv), v, s->dv);
            continue;
        }
        copy(of_head(x->rows, x, head, slot, x->dqk), k, s->dqk);
        columns = x->value_columns + head * s->dv * x->wide + slot;
        for (int64_t c = 0; c < s->dv; c++) columns[c * x->wide] = v[c];
    }
}

/* Hands the gradients of the state in a slot over and clears them. */
static void hand_over(Slots *x, int64_t slot) {
    const States *s = x->s;
    const int64_t row = x->state_of[slot], of_keys = s->heads * s->dqk, of_values = s->heads * s->dv;
    for (int64_t head = 0; head < s->heads; head++) {
        float *dk = of_head(x->dk, x, head, slot, x->dqk), *dv = of_head(x->dv_rows, x, head, slot, x->dv);
        if (row < s->states) {
            copy(s->dk + row * of_keys + head * s->dqk, dk, s->dqk);
            copy(s->dv_out + row * of_values + head * s->dv, dv, s->dv);
        } else {
            float *initial = x->initial + (row - s->states) * (of_keys + of_values);
            for (int64_t c = 0; c < s->dqk; c++) initial[head * s->dqk + c] += dk[c];
            for (int64_t c = 0; c < s->dv; c++) initial[of_keys + head * s->dv + c] += dv[c];
        }
        clear(dk, x->dqk);
        clear(dv, x->dv);
    }
}

/* Begins a user: the initial state of every domain, and nothing else.
 *
 * What lies in slots that are not in use is of users before, and is not read.
 */
static void begin(Slots *x, int backward) {
    const States *s = x->s;
    const int64_t places = s->num_domains * s->states_per_domain;
    memset(x->is_seen, 0, x->wide * sizeof(int32_t));
    memset(x->visits, 0, s->num_domains * sizeof(int64_t));
    for (int64_t place = 0; place < places; place++) x->slot_of[place] = -1;
    for (int64_t slot = 0; slot < x->wide; slot++) x->state_of[slot] = -1, x->written[slot] = 0;
    for (int64_t d = 0; d < s->num_domains; d++) {
        x->slot_of[d * s->states_per_domain] = d;
        put(x, d, s->states + d, backward);
    }
    x->used = s->num_domains;
}

/* Finds the slot of a domain's next state. */
static int64_t next_slot(Slots *x, int64_t domain) {
    const int64_t depth = x->s->states_per_domain;
    int64_t *slot = x->slot_of + domain * depth + x->visits[domain]++ % depth;
    if (*slot < 0) *slot = x->used++;
    return *slot;
}

/* Writes a token's state; one that nobody reads is replaced before the next query. */
static void visit(Slots *x, int64_t token, int backward) {
    const States *s = x->s;
    const int64_t slot = next_slot(x, s->domains[token]), row = s->state_of[token];
    if (backward && x->state_of[slot] >= 0) hand_over(x, slot);
    if (row < 0) {
        x->state_of[slot] = -1;
        return;
    }
    put(x, slot, row, backward);
    x->written[slot] = s->timestamps[token];
}

/* Tells how old all states are for a token. */
static void look_at_ages(Slots *x, int64_t token) {
    const States *s = x->s;
    if (!s->bias) return;
    for (int64_t j = 0; j < x->used; j += LANES) {
        longs difference;
        for (int lane = 0; lane < LANES; lane++)
            difference[lane] = s->next_timestamps[token] - x->written[j + lane];
        *(ints *)(x->ages + j) = time_bucket(difference, s->edges, (int32_t)s->never_written);
    }
    for (int64_t d = 0; d < s->num_domains; d++)
        if (!x->visits[d]) x->ages[d] = (int32_t)s->never_written;
}

/* result[j] += <row, columns[.][j]> of n columns. */
static inline void multiply(const float *row, const float *columns, int64_t width, int64_t wide, int64_t n,
                            float *result) {
    for (int64_t j = 0; j < n; j += LANES) {
        floats total = load(result + j), other = splat(0);
        int64_t c = 0;
        for (; c + 1 < width; c += 2) {
            total += splat(row[c]) * load(columns + c * wide + j);
            other += splat(row[c + 1]) * load(columns + (c + 1) * wide + j);
        }
        if (c < width) total += splat(row[c]) * load(columns + c * wide + j);
        store(result + j, total + other);
    }
}

/* total[c] = sum_j weights[j] rows[j][c], of a width that is padded to full vectors. */
static inline void add_rows(const float *weights, const float *rows, int64_t padded, int64_t n, float *total,
                            int64_t width) {
    for (int64_t c = 0; c < padded; c += LANES) {
        /* Several sums at once, since an addition waits for the one before it. */
        floats sums[SUMS] = {0};
        int64_t j = 0;
        for (; j + SUMS <= n; j += SUMS)
            for (int i = 0; i < SUMS; i++) sums[i] += splat(weights[j + i]) * load(rows + (j + i) * padded + c);
        for (; j < n; j++) sums[0] += splat(weights[j]) * load(rows + j * padded + c);
        const floats found = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        copy(total + c, (const float *)&found, width - c < LANES ? width - c : LANES);
    }
}

/* Makes the weights of the slots in use for a query's heads: softmax of scores and ages.
 *
 * Each step is taken for all heads before the next one: what they compute can overlap then.
 */
static void weigh(Slots *x, int64_t query) {
    const States *s = x->s;
    const int64_t wide = x->wide, used = x->used, heads = s->heads;
    for (int64_t head = 0; head < heads; head++) {
        const float *bias = x->bias + head * (s->never_written + 1);
        float *weights = x->weights + head * wide;
        for (int64_t j = 0; j < used; j++) weights[j] = s->bias ? bias[x->ages[j]] : 0;
    }
    for (int64_t head = 0; head < heads; head++)
        multiply(s->q + query * s->q_stride + head * s->dqk, x->key_columns + head * s->dqk * wide, s->dqk, wide, used,
                 x->weights + head * wide);
    for (int64_t head = 0; head < heads; head++) {
        floats top = splat(-INFINITY);
        for (int64_t j = 0; j < used; j += LANES) {
            const ints mask = *(const ints *)(x->is_seen + j);
            const floats score = choose(mask, load(x->weights + head * wide + j), splat(-INFINITY));
            top = choose(score > top, score, top);
        }
        x->totals[head] = largest(top);
    }
    for (int64_t head = 0; head < heads; head++) {
        const floats highest = splat(x->totals[head]);
        floats total = splat(0);
        for (int64_t j = 0; j < used; j += LANES) {
            float *at = x->weights + head * wide + j;
            const floats weight = keep(*(const ints *)(x->is_seen + j), exponential(load(at) - highest));
            store(at, weight);
            total += weight;
        }
        x->totals[head] = sum(total);
    }
    for (int64_t head = 0; head < heads; head++) {
        const floats scale = splat(1.0f / x->totals[head]);
        for (int64_t j = 0; j < used; j += LANES) {
            float *at = x->weights + head * wide + j;
            store(at, load(at) * scale);
        }
    }
}

static void answer(Slots *x, int64_t query) {
    const States *s = x->s;
    weigh(x, query);
    for (int64_t head = 0; head < s->heads; head++)
        add_rows(x->weights + head * x->wide, x->rows + head * x->wide * x->dv, x->dv, x->used,
                 s->out + (query * s->heads + head) * s->dv, s->dv);
}

/* rows[j] += weights[j] row. */
static inline void add_outer(const float *weights, const float *row, int64_t width, float *rows, int64_t padded,
                             int64_t n) {
    for (int64_t c = 0; c < padded; c += LANES) {
        floats part = splat(0);
        copy((float *)&part, row + c, width - c < LANES ? width - c : LANES);
        for (int64_t j = 0; j < n; j++)
            store(rows + j * padded + c, load(rows + j * padded + c) + splat(weights[j]) * part);
    }
}

static void answer_backward(Slots *x, int64_t query) {
    const States *s = x->s;
    const int64_t wide = x->wide, used = x->used, heads = s->heads;
    const float *queries = s->q + query * s->q_stride, *grads = s->grad_out + query * s->grad_out_stride;
    weigh(x, query);
    clear(x->slopes, heads * wide);
    for (int64_t head = 0; head < heads; head++)
        multiply(grads + head * s->dv, x->value_columns + head * s->dv * wide, s->dv, wide, used,
                 x->slopes + head * wide);
    for (int64_t head = 0; head < heads; head++) {
        const float *weights = x->weights + head * wide;
        float *slopes = x->slopes + head * wide;
        floats total = splat(0);
        for (int64_t j = 0; j < used; j += LANES) total += keep(*(const ints *)(x->is_seen + j), load(weights + j) * load(slopes + j));
        const floats mean = splat(sum(total));
        for (int64_t j = 0; j < used; j += LANES)
            store(slopes + j, load(weights + j) * (load(slopes + j) - mean));
    }
    for (int64_t head = 0; head < heads; head++) {
        const float *slopes = x->slopes + head * wide;
        add_rows(slopes, x->rows + head * wide * x->dqk, x->dqk, used, s->dq + (query * heads + head) * s->dqk,
                 s->dqk);
        add_outer(slopes, queries + head * s->dqk, s->dqk, x->dk + head * wide * x->dqk, x->dqk, used);
        add_outer(x->weights + head * wide, grads + head * s->dv, s->dv, x->dv_rows + head * wide * x->dv, x->dv,
                  used);
        /* States are often of one age: rows of sums keep one from waiting for the other. */
        double *sums = x->bias_sums + SUMS * head * (s->never_written + 1);
        for (int64_t j = 0; s->bias && j < used; j++) sums[SUMS * x->ages[j] + j % SUMS] += slopes[j];
    }
}

static void *take(void **at, int64_t bytes) {
    void *found = *at;
    *at = (char *)*at + (bytes + 63) / 64 * 64;
    return found;
}

/* Lays the slots out in one block of memory, which the caller frees. */
static void *make_slots(Slots *x, const States *s, int backward) {
    const int64_t f = sizeof(float);
    x->s = s;
    int64_t longest = 0;
    for (int64_t user = 0; user < s->users; user++) {
        const int64_t length = s->offsets[user + 1] - s->offsets[user];
        longest = length > longest ? length : longest;
    }
    const int64_t places = s->num_domains * s->states_per_domain;
    const int64_t most = places < s->num_domains + longest ? places : s->num_domains + longest;
    const int64_t wide = x->wide = round_up(most), lanes = s->heads * wide;
    x->dqk = round_up(s->dqk);
    x->dv = round_up(s->dv);
    const int64_t keys = lanes * x->dqk * f, values = lanes * x->dv * f;
    const int64_t tables = s->heads * (s->never_written + 1) * f;
    const int64_t small = 2 * lanes * f + 3 * 8 * wide + s->heads * f + 8 * (places + s->num_domains);
    /* Each part may be rounded up to a line of the cache. */
    const int64_t size = 3 * (keys + values) + tables + small + 16 * 64;
    void *block = memset(aligned(size), 0, size), *at = block;
    x->key_columns = take(&at, keys);
    x->value_columns = take(&at, values);
    x->rows = take(&at, backward ? keys : values);
    x->dk = take(&at, keys);
    x->dv_rows = take(&at, values);
    x->bias = take(&at, tables);
    x->weights = take(&at, lanes * f);
    x->slopes = take(&at, lanes * f);
    x->totals = take(&at, s->heads * f);
    x->written = take(&at, wide * 8);
    x->state_of = take(&at, wide * 8);
    x->ages = take(&at, wide * 4);
    x->is_seen = take(&at, wide * 4);
    x->visits = take(&at, s->num_domains * 8);
    x->slot_of = take(&at, places * 8);
    for (int64_t head = 0; s->bias && head < s->heads; head++)
        for (int64_t age = 0; age <= s->never_written; age++)
            x->bias[head * (s->never_written + 1) + age] = s->bias[age * s->heads + head];
    return block;
}

static void walk(Slots *x, int64_t user, int backward) {
    const States *s = x->s;
    const int64_t first = s->offsets[user];
    int64_t end = s->offsets[user + 1];
    /* What is written after the last query is read by nobody, but has a gradient, of zeros. */
    while (!backward && end > first && s->query_of[end - 1] < 0) end--;
    if (first == end) return;
    begin(x, backward);
    for (int64_t token = first; token < end; token++) {
        const int64_t query = s->query_of[token];
        visit(x, token, backward);
        if (query < 0) continue;
        look_at_ages(x, token);
        (backward ? answer_backward : answer)(x, query);
    }
    for (int64_t slot = 0; backward && slot < x->used; slot++)
        if (x->state_of[slot] >= 0) hand_over(x, slot);
}

/* Cuts the users into pieces of about as many tokens. */
static void cut(const States *s, int64_t first_user[PIECES + 1]) {
    int64_t piece = 0;
    for (int64_t user = 0; user < s->users; user++)
        while (piece <= PIECES && s->offsets[user] * PIECES >= piece * s->tokens) first_user[piece++] = user;
    while (piece <= PIECES) first_user[piece++] = s->users;
    first_user[PIECES] = s->users;
}

static void compute(const States *s, int backward) {
    int64_t first_user[PIECES + 1];
    cut(s, first_user);
    const int64_t of_state = s->heads * (s->dqk + s->dv), of_initial = s->num_domains * of_state;
    const int64_t table = s->heads * (s->never_written + 1) * SUMS;
    float *initial = backward ? calloc(PIECES * of_initial, sizeof(float)) : NULL;
    double *bias_sums = backward ? calloc(PIECES * table, sizeof(double)) : NULL;
    if (backward && (!initial || !bias_sums)) abort();
#pragma omp parallel num_threads((int)s->threads)
    {
        Slots slots;
        void *memory = make_slots(&slots, s, backward);
#pragma omp for schedule(dynamic)
        for (int piece = 0; piece < PIECES; piece++) {
            slots.initial = backward ? initial + piece * of_initial : NULL;
            slots.bias_sums = backward ? bias_sums + piece * table : NULL;
            for (int64_t user = first_user[piece]; user < first_user[piece + 1]; user++)
                walk(&slots, user, backward);
        }
        free(memory);
    }
    const int64_t of_keys = s->heads * s->dqk;
    for (int piece = 0; backward && piece < PIECES; piece++) {
        for (int64_t i = 0; i < of_initial; i++) {
            const int64_t row = s->states + i / of_state, c = i % of_state;
            float *to = c < of_keys ? s->dk + row * of_keys + c : s->dv_out + row * s->heads * s->dv + c - of_keys;
            *to = (piece ? *to : 0) + initial[piece * of_initial + i];
        }
        for (int64_t i = 0; s->bias && i < table; i++) s->bias_sums[i / SUMS] += bias_sums[piece * table + i];
    }
    free(initial);
    free(bias_sums);
}

void hstu_xd_ask_states(const States *s) { compute(s, 0); }
void hstu_xd_ask_states_backward(const States *s) { compute(s, 1); }
