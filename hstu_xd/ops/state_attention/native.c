/* DDSR's attention on a CPU: walks over each history once and holds the states that can be seen.
 *
 * A state lies in a slot. A user begins with a slot a domain, of its initial state, and gets others
 * as a domain is visited, up to M of each: what nobody visits costs one slot. A token's state takes
 * the place of the oldest one of its domain. Initial states come first, so that what is the same
 * for all of them is computed once for many.
 *
 * A few tokens are taken at a time, a block: until it ends, what they replace keeps its slot beside
 * theirs, and every slot says which tokens of the block see it. So several queries meet a slot when
 * it is read. Going back, the gradients of a state are summed in its slot until it is replaced, so
 * that they are written once.
 */

#include "../vectors.h"

#include <math.h>

/* Tokens of a block at most, a multiple of ROWS. */
enum { BLOCK = 16 };
/* Slots for which a block has another token. */
enum { OTHERS = 16 };
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

/* What a user's slots hold. Of LANES slots side by side, all columns lie together. */
typedef struct {
    const States *s;
    int64_t initial;        /* leading slots that hold initial states */
    int64_t used, wide;     /* slots that have been in use, and how many there are, rounded up */
    int64_t spare;          /* those of them that hold nothing any more */
    int64_t dqk, dv;        /* widths of a packed row, rounded up */
    float *key_columns;     /* (heads, wide / LANES, dqk, LANES) */
    float *value_columns;   /* (heads, wide / LANES, dv, LANES), backward */
    float *rows;            /* (heads, wide, dqk or dv): values forward, keys backward */
    float *dk, *dv_rows;    /* (heads, wide, dqk) and (heads, wide, dv), backward */
    float *bias;            /* (heads, never_written + 2), the last one of what is not seen */
    float *weights, *slopes; /* (ROWS, wide) */
    float *queries, *grads, *totals; /* (ROWS, dqk), (ROWS, dv), and (ROWS, either) of what is summed */
    int32_t *ages;          /* (ROWS, wide), never_written + 1: not seen */
    int64_t *written;       /* (wide,) time of a state */
    int64_t *state_of;      /* (wide,) row of the state; -1: none that anybody reads */
    int32_t *from, *until;  /* (wide,) tokens of the block that see the slot */
    int64_t *spares;        /* (wide,) */
    int64_t *slot_of;       /* (num_domains, states_per_domain), -1: none yet */
    int64_t *visits;        /* (num_domains,) */
    float *gradients;       /* (num_domains, heads * (dqk + dv)): of initial states */
    double *bias_sums;      /* of the piece */
} Slots;

/* Some tokens in a row. */
typedef struct {
    int64_t first, tokens;
    int64_t places[BLOCK]; /* where slot_of has the slot of the state that each token replaces */
    int64_t slots[BLOCK];  /* of their states */
} Block;

/* Where a state's head begins in what is kept of it, see Slots. */
static inline float *of_head(float *rows, const Slots *x, int64_t head, int64_t slot, int64_t width) {
    return rows + (head * x->wide + slot) * width;
}

/* Puts a row of a head into the column of a slot. */
static inline void put_column(float *columns, const Slots *x, int64_t head, int64_t slot, const float *row, int64_t width) {
    float *to = columns + (head * x->wide + slot / LANES * LANES) * width + slot % LANES;
    for (int64_t c = 0; c < width; c++) to[c * LANES] = row[c];
}

/* products[r][j] = <rows[r], columns of slot j>, of a head's slots. */
static void ask_columns(const Slots *x, const float *rows, int64_t padded, const float *columns, int64_t width,
                        int64_t slots, float *products) {
    for (int64_t j = 0; j < slots; j += LANES)
        multiply(rows, padded, columns + j * width, width, LANES, LANES, products + j, x->wide);
}

/* Puts a row of keys and values into a slot; of no row nobody reads what lies there. */
static void put(Slots *x, int64_t slot, int64_t row, int64_t written, int backward) {
    const States *s = x->s;
    x->state_of[slot] = row;
    x->written[slot] = written;
    for (int64_t head = 0; head < s->heads; head++) {
        if (row < 0) {
            clear(of_head(x->rows, x, head, slot, backward ? x->dqk : x->dv), backward ? x->dqk : x->dv);
            continue;
        }
        const float *k = s->k + row * s->k_stride + head * s->dqk;
        const float *v = s->v + row * s->v_stride + head * s->dv;
        put_column(x->key_columns, x, head, slot, k, s->dqk);
        if (!backward) {
            copy(of_head(x->rows, x, head, slot, x->dv), v, s->dv);
            continue;
        }
        copy(of_head(x->rows, x, head, slot, x->dqk), k, s->dqk);
        put_column(x->value_columns, x, head, slot, v, s->dv);
    }
}

/* Hands the gradients of the state in a slot over and clears them. */
static void hand_over(Slots *x, int64_t slot) {
    const States *s = x->s;
    const int64_t row = x->state_of[slot], of_keys = s->heads * s->dqk, of_values = s->heads * s->dv;
    for (int64_t head = 0; head < s->heads; head++) {
        float *dk = of_head(x->dk, x, head, slot, x->dqk), *dv = of_head(x->dv_rows, x, head, slot, x->dv);
        if (row >= 0 && row < s->states) {
            copy(s->dk + row * of_keys + head * s->dqk, dk, s->dqk);
            copy(s->dv_out + row * of_values + head * s->dv, dv, s->dv);
        } else if (row >= 0) {
            float *of_initial = x->gradients + (row - s->states) * (of_keys + of_values);
            for (int64_t c = 0; c < s->dqk; c++) of_initial[head * s->dqk + c] += dk[c];
            for (int64_t c = 0; c < s->dv; c++) of_initial[of_keys + head * s->dv + c] += dv[c];
        }
        clear(dk, x->dqk);
        clear(dv, x->dv);
    }
}

/* Begins a user: the initial state of every domain, and nothing else. */
static void begin(Slots *x, int backward) {
    const States *s = x->s;
    const int64_t places = s->num_domains * s->states_per_domain;
    memset(x->visits, 0, s->num_domains * sizeof(int64_t));
    for (int64_t place = 0; place < places; place++) x->slot_of[place] = -1;
    for (int64_t d = 0; d < s->num_domains; d++) {
        x->slot_of[d * s->states_per_domain] = d;
        put(x, d, s->states + d, 0, backward);
    }
    x->initial = x->used = s->num_domains;
    x->spare = 0;
}

/* Puts the states of the next tokens beside those there are, and tells which token sees which slot. */
static Block begin_block(Slots *x, int64_t first, int64_t end, int backward) {
    const States *s = x->s;
    /* The more slots there are, the less it matters that a query meets those of its block. */
    const int64_t most = smaller(BLOCK, ROWS + x->used / OTHERS / ROWS * ROWS);
    Block block = {.first = first, .tokens = smaller(most, end - first)};
    for (int64_t j = 0; j < x->used; j++) {
        x->from[j] = 0;
        x->until[j] = x->state_of[j] >= 0 ? BLOCK : 0;
    }
    for (int64_t i = 0; i < block.tokens; i++) {
        const int64_t token = first + i, domain = s->domains[token], slot = x->spare ? x->spares[--x->spare] : x->used++;
        const int64_t place = domain * s->states_per_domain + x->visits[domain]++ % s->states_per_domain;
        int64_t replaced = x->slot_of[place];
        for (int64_t earlier = 0; earlier < i; earlier++)
            if (block.places[earlier] == place) replaced = block.slots[earlier];
        if (replaced >= 0) x->until[replaced] = (int32_t)smaller(x->until[replaced], i);
        block.places[i] = place;
        block.slots[i] = slot;
        put(x, slot, s->state_of[token], s->timestamps[token], backward);
        x->from[slot] = (int32_t)i;
        x->until[slot] = s->state_of[token] >= 0 ? BLOCK : 0;
    }
    /* What lies in lanes that have not been in use is of users before, and is not seen. */
    for (int64_t j = x->used; j < round_up(x->used); j++) x->until[j] = 0;
    return block;
}

/* Gives up the slot of a state that is replaced; returns one that is free then. */
static int64_t give_up(Slots *x, int64_t slot, int backward) {
    const States *s = x->s;
    if (backward) hand_over(x, slot);
    if (slot < x->initial && slot != --x->initial) {
        /* The last one of the initial states takes its place among them. */
        const int64_t last = x->initial, row = x->state_of[last];
        if (backward) hand_over(x, last);
        put(x, slot, row, 0, backward);
        x->slot_of[(row - s->states) * s->states_per_domain] = slot;
        slot = last;
    }
    x->state_of[slot] = -1;
    return slot;
}

/* Leaves the states that no later token of the block has replaced. */
static void end_block(Slots *x, const Block *block, int backward) {
    for (int64_t i = 0; i < block->tokens; i++) {
        int64_t *slot = x->slot_of + block->places[i];
        if (*slot >= 0) x->spares[x->spare++] = give_up(x, *slot, backward);
        *slot = block->slots[i];
    }
}

/* Tells how old all states are for a token of a block. */
static void look_at_ages(Slots *x, int64_t token, int32_t place, int64_t slots, int32_t *ages) {
    const States *s = x->s;
    const ints never = splat_int((int32_t)s->never_written), here = splat_int(place);
    for (int64_t j = 0; j < slots; j += LANES) {
        ints age = never, is_seen = here < *(const ints *)(x->until + j);
        if (j + LANES > x->initial) {
            int64_t difference[LANES];
            for (int lane = 0; lane < LANES; lane++)
                difference[lane] = s->next_timestamps[token] - x->written[j + lane];
            const ints is_initial = lanes_from((int32_t)j) < splat_int((int32_t)x->initial);
            const ints bucket = time_bucket(difference, s->edges, (int32_t)s->never_written);
            age = (never & is_initial) | (bucket & ~is_initial);
            is_seen &= here >= *(const ints *)(x->from + j);
        }
        *(ints *)(ages + j) = (age & is_seen) | (splat_int((int32_t)s->never_written + 1) & ~is_seen);
    }
}

/* Adds to the scores of some queries' head what the ages of the states say; what is not seen: -inf.
 *
 * Rows are taken side by side here and below: what they compute can overlap then.
 */
static void add_bias(const Slots *x, int64_t head, int64_t slots, floats highest[ROWS]) {
    const float *bias = x->bias + head * (x->s->never_written + 2);
    const ints never = splat_int((int32_t)x->s->never_written);
    const floats of_initial = splat(bias[x->s->never_written]);
    for (int r = 0; r < ROWS; r++) highest[r] = splat(-INFINITY);
    for (int64_t j = 0; j < slots; j += LANES)
        for (int r = 0; r < ROWS; r++) {
            const ints age = *(const ints *)(x->ages + r * x->wide + j);
            floats found = choose(age == never, of_initial, splat(-INFINITY));
            if (j + LANES > x->initial)
                for (int lane = 0; lane < LANES; lane++) found[lane] = bias[age[lane]];
            const floats score = load(x->weights + r * x->wide + j) + found;
            store(x->weights + r * x->wide + j, score);
            highest[r] = choose(score > highest[r], score, highest[r]);
        }
    for (int r = 0; r < ROWS; r++) highest[r] = splat(largest(highest[r]));
}

/* Turns scores into exponentials and sums them. What is not seen becomes zero. */
static void exponentiate(const Slots *x, int64_t slots, const floats highest[ROWS], float sums[ROWS]) {
    floats total[ROWS] = {0};
    for (int64_t j = 0; j < slots; j += LANES)
        for (int r = 0; r < ROWS; r++) {
            float *at = x->weights + r * x->wide + j;
            const floats score = load(at);
            const floats weight = keep(score > splat(-INFINITY), exponential(score - highest[r]));
            store(at, weight);
            total[r] += weight;
        }
    for (int r = 0; r < ROWS; r++) sums[r] = sum(total[r]);
}

/* A few queries of a block, and how many slots they may see. */
typedef struct {
    int64_t rows, slots;
    int64_t query[ROWS];
} Rows;

/* Takes a head of some rows, (rows, heads * width), and zeros up to ROWS of them. */
static void take_rows(const float *from, int64_t stride, const Rows *rows, int64_t width, float *to, int64_t padded) {
    for (int64_t r = 0; r < ROWS; r++) {
        if (r < rows->rows)
            copy(to + r * padded, from + rows->query[r] * stride, width);
        else
            clear(to + r * padded, padded);
    }
}

/* Makes the weights, not divided by their sums, of a head of a few queries; writes 1 / sum. */
static void weigh(Slots *x, const Rows *rows, int64_t head, float *factors) {
    const States *s = x->s;
    take_rows(s->q + head * s->dqk, s->q_stride, rows, s->dqk, x->queries, x->dqk);
    ask_columns(x, x->queries, x->dqk, x->key_columns + head * x->wide * s->dqk, s->dqk, rows->slots, x->weights);
    floats highest[ROWS];
    add_bias(x, head, rows->slots, highest);
    exponentiate(x, rows->slots, highest, factors);
    for (int r = 0; r < ROWS; r++) factors[r] = 1.0f / factors[r];
}

static void answer(Slots *x, const Rows *rows) {
    const States *s = x->s;
    float factors[ROWS];
    for (int64_t head = 0; head < s->heads; head++) {
        weigh(x, rows, head, factors);
        clear(x->totals, ROWS * x->dv);
        add_rows(x->weights, x->wide, x->rows + head * x->wide * x->dv, x->dv, rows->slots, x->totals);
        for (int64_t r = 0; r < rows->rows; r++) {
            float *out = s->out + (rows->query[r] * s->heads + head) * s->dv;
            for (int64_t c = 0; c < s->dv; c++) out[c] = x->totals[r * x->dv + c] * factors[r];
        }
    }
}

/* totals[j] += sum_r weights[r][j] rows[r] of rows that are padded to full vectors. */
static inline void add_outer(const float *weights, int64_t apart, const float *rows, int64_t padded, int64_t n,
                             float *totals) {
    for (int64_t c = 0; c < padded; c += LANES) {
        floats row[ROWS];
        for (int r = 0; r < ROWS; r++) row[r] = load(rows + r * padded + c);
        for (int64_t j = 0; j < n; j++) {
            floats total = load(totals + j * padded + c);
            for (int r = 0; r < ROWS; r++) total += splat(weights[r * apart + j]) * row[r];
            store(totals + j * padded + c, total);
        }
    }
}

/* Makes the gradients of scores of those of weights, which are divided by their sum on the way. */
static void make_slopes(float *weights, float *slopes, int64_t slots, float factor) {
    floats total = splat(0);
    for (int64_t j = 0; j < slots; j += LANES) {
        const floats weight = load(weights + j) * splat(factor);
        store(weights + j, weight);
        total += keep(weight > splat(0), weight * load(slopes + j));
    }
    const floats mean = splat(sum(total));
    for (int64_t j = 0; j < slots; j += LANES) {
        const floats weight = load(weights + j);
        store(slopes + j, keep(weight > splat(0), weight * (load(slopes + j) - mean)));
    }
}

/* Adds the gradients of a query's scores to those of the biases of their ages. */
static void add_to_bias(const Slots *x, int64_t head, const int32_t *ages, const float *slopes, int64_t slots) {
    double *sums = x->bias_sums + SUMS * head * (x->s->never_written + 2);
    const int64_t full = x->initial / LANES * LANES;
    floats of_initial = splat(0);
    for (int64_t j = 0; j < full; j += LANES) of_initial += load(slopes + j);
    sums[SUMS * x->s->never_written] += sum(of_initial);
    /* States are often of one age: rows of sums keep one from waiting for the other. */
    for (int64_t j = full; j < slots; j++) sums[SUMS * ages[j] + j % SUMS] += slopes[j];
}

static void answer_backward(Slots *x, const Rows *rows) {
    const States *s = x->s;
    const int64_t wide = x->wide, slots = rows->slots;
    float factors[ROWS];
    for (int64_t head = 0; head < s->heads; head++) {
        weigh(x, rows, head, factors);
        take_rows(s->grad_out + head * s->dv, s->grad_out_stride, rows, s->dv, x->grads, x->dv);
        ask_columns(x, x->grads, x->dv, x->value_columns + head * wide * s->dv, s->dv, slots, x->slopes);
        for (int64_t r = 0; r < rows->rows; r++) {
            make_slopes(x->weights + r * wide, x->slopes + r * wide, slots, factors[r]);
            if (s->bias) add_to_bias(x, head, x->ages + r * wide, x->slopes + r * wide, slots);
        }
        for (int64_t r = rows->rows; r < ROWS; r++) clear(x->slopes + r * wide, round_up(slots));
        clear(x->totals, ROWS * x->dqk);
        add_rows(x->slopes, wide, x->rows + head * wide * x->dqk, x->dqk, slots, x->totals);
        for (int64_t r = 0; r < rows->rows; r++)
            copy(s->dq + (rows->query[r] * s->heads + head) * s->dqk, x->totals + r * x->dqk, s->dqk);
        add_outer(x->slopes, wide, x->queries, x->dqk, slots, of_head(x->dk, x, head, 0, x->dqk));
        add_outer(x->weights, wide, x->grads, x->dv, slots, of_head(x->dv_rows, x, head, 0, x->dv));
    }
}

/* Lets a row that no query has see nothing. */
static void see_nothing(const Slots *x, int32_t *ages) {
    for (int64_t j = 0; j < x->used; j += LANES) *(ints *)(ages + j) = splat_int((int32_t)x->s->never_written + 1);
}

/* Lets the tokens of a block ask that do, ROWS at a time. */
static void ask(Slots *x, const Block *block, int backward) {
    Rows rows = {.rows = 0, .slots = x->used};
    for (int64_t i = 0; i < block->tokens; i++) {
        const int64_t token = block->first + i, query = x->s->query_of[token];
        if (query >= 0) {
            look_at_ages(x, token, (int32_t)i, rows.slots, x->ages + rows.rows * x->wide);
            rows.query[rows.rows++] = query;
        }
        if (!rows.rows || (rows.rows < ROWS && i + 1 < block->tokens)) continue;
        for (int64_t r = rows.rows; r < ROWS; r++) see_nothing(x, x->ages + r * x->wide);
        (backward ? answer_backward : answer)(x, &rows);
        rows.rows = 0;
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
    const int64_t wide = x->wide = round_up(smaller(places, s->num_domains + longest) + BLOCK);
    x->dqk = round_up(s->dqk);
    x->dv = round_up(s->dv);
    const int64_t keys = s->heads * wide * x->dqk * f, values = s->heads * wide * x->dv * f;
    const int64_t ages = s->never_written + 2, tables = s->heads * ages * f;
    const int64_t few = ROWS * (2 * wide + 2 * x->dqk + 2 * x->dv) * f + ROWS * wide * 4;
    const int64_t small = few + 4 * 8 * wide + 8 * (places + s->num_domains);
    /* Each part may be rounded up to a line of the cache. */
    const int64_t size = 3 * (keys + values) + tables + small + 20 * 64;
    void *block = memset(aligned(size), 0, size), *at = block;
    x->key_columns = take(&at, keys);
    x->value_columns = take(&at, values);
    x->rows = take(&at, backward ? keys : values);
    x->dk = take(&at, keys);
    x->dv_rows = take(&at, values);
    x->bias = take(&at, tables);
    x->weights = take(&at, ROWS * wide * f);
    x->slopes = take(&at, ROWS * wide * f);
    x->queries = take(&at, ROWS * x->dqk * f);
    x->grads = take(&at, ROWS * x->dv * f);
    x->totals = take(&at, ROWS * (x->dqk + x->dv) * f);
    x->ages = take(&at, ROWS * wide * 4);
    x->written = take(&at, wide * 8);
    x->state_of = take(&at, wide * 8);
    x->from = take(&at, wide * 4);
    x->until = take(&at, wide * 4);
    x->spares = take(&at, wide * 8);
    x->visits = take(&at, s->num_domains * 8);
    x->slot_of = take(&at, places * 8);
    for (int64_t head = 0; head < s->heads; head++) {
        for (int64_t age = 0; s->bias && age + 1 < ages; age++)
            x->bias[head * ages + age] = s->bias[age * s->heads + head];
        x->bias[head * ages + ages - 1] = -INFINITY;
    }
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
    for (int64_t token = first; token < end;) {
        const Block block = begin_block(x, token, end, backward);
        ask(x, &block, backward);
        end_block(x, &block, backward);
        token += block.tokens;
    }
    for (int64_t slot = 0; backward && slot < x->used; slot++) hand_over(x, slot);
}

/* Cuts the users into pieces of about as many tokens. */
static void cut(const States *s, int64_t first_user[PIECES + 1]) {
    int64_t piece = 0;
    for (int64_t user = 0; user < s->users; user++)
        while (piece <= PIECES && s->offsets[user] * PIECES >= piece * s->tokens) first_user[piece++] = user;
    while (piece <= PIECES) first_user[piece++] = s->users;
    first_user[PIECES] = s->users;
}

/* Sums the gradients that the pieces have of initial states and of the bias. */
static void add_pieces(const States *s, const int64_t first_user[PIECES + 1], const float *gradients,
                       const double *bias_sums) {
    const int64_t of_keys = s->heads * s->dqk, of_values = s->heads * s->dv, of_state = of_keys + of_values;
    const int64_t table = s->heads * (s->never_written + 2);
#pragma omp parallel for num_threads((int)s->threads)
    for (int64_t d = 0; d < s->num_domains; d++) {
        float *dk = s->dk + (s->states + d) * of_keys, *dv = s->dv_out + (s->states + d) * of_values;
        memset(dk, 0, of_keys * sizeof(float));
        memset(dv, 0, of_values * sizeof(float));
        for (int piece = 0; piece < PIECES; piece++) {
            const float *of_initial = gradients + (piece * s->num_domains + d) * of_state;
            if (first_user[piece] == first_user[piece + 1]) continue;
            for (int64_t c = 0; c < of_keys; c++) dk[c] += of_initial[c];
            for (int64_t c = 0; c < of_values; c++) dv[c] += of_initial[of_keys + c];
        }
    }
    for (int64_t i = 0; s->bias && i < PIECES * table * SUMS; i++) {
        const int64_t entry = i / SUMS % table, head = entry / (s->never_written + 2), age = entry % (s->never_written + 2);
        if (age <= s->never_written) s->bias_sums[head * (s->never_written + 1) + age] += bias_sums[i];
    }
}

static void compute(const States *s, int backward) {
    int64_t first_user[PIECES + 1];
    cut(s, first_user);
    const int64_t of_initial = s->num_domains * s->heads * (s->dqk + s->dv);
    const int64_t table = s->heads * (s->never_written + 2) * SUMS;
    float *gradients = backward ? calloc(PIECES * of_initial, sizeof(float)) : NULL;
    double *bias_sums = backward ? calloc(PIECES * table, sizeof(double)) : NULL;
    if (backward && (!gradients || !bias_sums)) abort();
#pragma omp parallel num_threads((int)s->threads)
    {
        Slots slots;
        void *memory = make_slots(&slots, s, backward);
#pragma omp for schedule(dynamic)
        for (int piece = 0; piece < PIECES; piece++) {
            slots.gradients = backward ? gradients + piece * of_initial : NULL;
            slots.bias_sums = backward ? bias_sums + piece * table : NULL;
            for (int64_t user = first_user[piece]; user < first_user[piece + 1]; user++)
                walk(&slots, user, backward);
        }
        free(memory);
    }
    if (backward) add_pieces(s, first_user, gradients, bias_sums);
    free(gradients);
    free(bias_sums);
}

void hstu_xd_ask_states(const States *s) { compute(s, 0); }
void hstu_xd_ask_states_backward(const States *s) { compute(s, 1); }
