/* Checkpoint folders: which shards are read, where tensors are found, what is refused. */
#include "tests/scratch.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <time.h>

#include "io/file.h"
#include "io/format/checkpoint.h"
#include "io/format/which.h"

static struct perta_err err;

#define INDEX "m/" PERTA_INDEX_NAME

/* A shard of one-byte tensors with names of one letter. */
static void put_shard(const char *path, const char *letters)
{
    struct perta_tensor tensors[8];
    char names[8][2];
    uint64_t one = 1, n = strlen(letters), len;
    for (uint64_t i = 0; i < n; i++) {
        names[i][0] = letters[i];
        names[i][1] = '\0';
        tensors[i] = (struct perta_tensor){
            .name = names[i], .dtype = PERTA_U8, .n_dims = 1, .shape = &one, .n_elems = 1};
    }
    uint8_t *bytes = make_header(tensors, n, n, &len);
    memset(bytes + len, 'x', n);
    put_file(path, bytes, len + n);
    free(bytes);
}

/* Checkpoint m: shards 1 (b, d) and 2 (a, c), and an index for them. */
static void enter_model(void)
{
    enter();
    mkdir("m", 0777);
    put_shard("m/1.safetensors", "bd");
    put_shard("m/2.safetensors", "ca");
    put_text(INDEX, "{\"metadata\":{\"total_size\":4},\"weight_map\":"
                    "{\"a\":\"2.safetensors\",\"b\":\"1.safetensors\","
                    "\"c\":\"2.safetensors\",\"d\":\"1.safetensors\"}}");
}

static void has_all_four(const char *path)
{
    struct perta_checkpoint *ck;
    struct perta_err e = {0};
    ck_assert_msg(!perta_checkpoint_open(path, &ck, &e), "%s", e.msg);
    ck_assert_str_eq(ck->path, "m");
    ck_assert_uint_eq(ck->n_shards, 2);
    ck_assert_uint_eq(ck->n_tensors, 4);
    for (int i = 0; i < 4; i++) {
        const char name[] = {(char)('a' + i), 0};
        const struct perta_ref *ref = perta_checkpoint_find(ck, name);
        ck_assert_ptr_nonnull(ref);
        ck_assert_str_eq(ref->tensor->name, name);
        ck_assert_str_eq(ck->shards[ref->shard].name, i % 2 ? "1.safetensors" : "2.safetensors");
        ck_assert_str_eq(ck->by_name[i].tensor->name, name);
    }
    ck_assert_ptr_null(perta_checkpoint_find(ck, ""));
    ck_assert_ptr_null(perta_checkpoint_find(ck, "aa"));
    perta_checkpoint_close(ck);
}

START_TEST(tensors_are_found_with_an_index_and_without)
{
    unsigned n_open = count_open_files();
    has_all_four("m");
    has_all_four("m///");
    ck_assert_int_eq(unlink(INDEX), 0);
    put_shard("m/.hidden.safetensors", "a");
    has_all_four("m");
    ck_assert_uint_eq(count_open_files(), n_open);
}
END_TEST

START_TEST(one_file_is_a_checkpoint_too)
{
    struct perta_checkpoint *ck;
    ck_assert_ok(perta_checkpoint_open("m/1.safetensors", &ck, &err));
    ck_assert_uint_eq(ck->n_tensors, 2);
    ck_assert_str_eq(ck->shards[0].name, "1.safetensors");
    ck_assert_ptr_nonnull(perta_checkpoint_find(ck, "d"));
    ck_assert_ptr_null(perta_checkpoint_find(ck, "a"));
    perta_checkpoint_close(ck);
    /* without an index, only model.safetensors counts */
    put_shard("m/model.safetensors", "z");
    unlink(INDEX);
    ck_assert_ok(perta_checkpoint_open("m", &ck, &err));
    ck_assert_uint_eq(ck->n_tensors, 1);
    perta_checkpoint_close(ck);
}
END_TEST

START_TEST(a_config_that_is_not_json_is_no_config)
{
    struct perta_checkpoint *ck;
    put_text("m/config.json", "{\"tie_word_embeddings\": true}");
    ck_assert_ok(perta_checkpoint_open("m", &ck, &err));
    ck_assert(json_is_true(json_object_get(ck->config, "tie_word_embeddings")));
    ck_assert_ptr_null(ck->config_flaw);
    perta_checkpoint_close(ck);
    put_text("m/config.json", "{\"x\": Unlimited}");
    ck_assert_ok(perta_checkpoint_open("m", &ck, &err));
    ck_assert_ptr_null(ck->config);
    ck_assert_msg(strstr(ck->config_flaw, "m/config.json: byte 15: not valid JSON"), "%s",
                  ck->config_flaw);
    perta_checkpoint_close(ck);
}
END_TEST

static void is_refused(const char *path, const char *says)
{
    struct perta_checkpoint *ck = (void *)1;
    struct perta_err e = {0};
    unsigned n_open = count_open_files();
    ck_assert_msg(perta_checkpoint_open(path, &ck, &e) == PERTA_EINPUT, "%s: %d %s", says, e.code,
                  e.msg);
    ck_assert_ptr_null(ck);
    ck_assert_msg(strstr(e.msg, says), "says: %s\n  not: %s", e.msg, says);
    ck_assert_uint_eq(count_open_files(), n_open);
}

START_TEST(an_index_that_shards_do_not_bear_out_is_refused)
{
    static const struct {
        const char *index, *says;
    } cases[] = {
        {"", "byte 0: not valid JSON"},
        {"{\"weight_map\":{}} x", "not valid JSON"},
        {"{}", INDEX ": no object \"weight_map\""},
        {"{\"weight_map\":[]}", "no object \"weight_map\""},
        {"{\"weight_map\":{\"a\":\"1.safetensors\",\"a\":\"2.safetensors\"}}", "duplicate"},
        {"{\"weight_map\":{\"a\":1}}", "tensor a: no shard name"},
        {"{\"weight_map\":{\"a\":\"../m/2.safetensors\"}}",
         "tensor a: shard \"../m/2.safetensors\" is not a plain file name"},
        {"{\"weight_map\":{\"a\":\"/etc/x.safetensors\"}}", "is not a plain file name"},
        {"{\"weight_map\":{\"a\":\".x.safetensors\"}}", "is not a plain file name"},
        {"{\"weight_map\":{\"a\":\"\"}}", "is not a plain file name"},
        {"{\"weight_map\":{\"a\":\"pytorch_model.bin\"}}", "is not a .safetensors file"},
        {"{\"weight_map\":{\"a\":\".safetensors\"}}", "is not a plain file name"},
        {"{\"weight_map\":{\"a\":\"3.safetensors\"}}", "m/3.safetensors: no such file"},
        {"{\"weight_map\":{\"a\":\"2.safetensors\",\"c\":\"2.safetensors\","
         "\"e\":\"2.safetensors\"}}",
         "tensor e should be in 2.safetensors, which does not have it"},
        {"{\"weight_map\":{\"c\":\"2.safetensors\",\"e\":\"2.safetensors\"}}",
         "tensor e should be in 2.safetensors, which does not have it"},
        {"{\"weight_map\":{\"a\":\"1.safetensors\",\"b\":\"1.safetensors\","
         "\"c\":\"2.safetensors\",\"d\":\"1.safetensors\"}}",
         "tensor a should be in 1.safetensors, but is in 2.safetensors"},
        {"{\"weight_map\":{\"a\":\"2.safetensors\"}}",
         "m/2.safetensors: tensor c is not in " PERTA_INDEX_NAME},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        put_text(INDEX, cases[i].index);
        is_refused("m", cases[i].says);
    }
}
END_TEST

START_TEST(a_tensor_in_two_shards_is_refused)
{
    unlink(INDEX);
    put_shard("m/3.safetensors", "ec");
    is_refused("m", "m: tensor c is in ");
}
END_TEST

START_TEST(a_damaged_shard_is_named)
{
    put_text("m/2.safetensors", "\x02");
    is_refused("m", "m/2.safetensors: too short");
}
END_TEST

START_TEST(what_is_no_regular_file_in_the_folder_is_refused_at_once)
{
    unlink("m/2.safetensors");
    ck_assert_int_eq(mkfifo("m/2.safetensors", 0600), 0);
    is_refused("m", "m/2.safetensors: not a regular file");
    unlink("m/2.safetensors");
    ck_assert_int_eq(mkdir("m/2.safetensors", 0700), 0);
    is_refused("m", "m/2.safetensors: a folder");
    rmdir("m/2.safetensors");
    put_shard("2.safetensors", "ca");
    ck_assert_int_eq(symlink("../2.safetensors", "m/2.safetensors"), 0);
    is_refused("m", "outside its folder");
    unlink("2.safetensors");
    is_refused("m", "m/2.safetensors: a broken symbolic link");
    unlink("m/2.safetensors");
    ck_assert_int_eq(symlink("2.safetensors", "m/2.safetensors"), 0);
    is_refused("m", "m/2.safetensors: a broken symbolic link");
    unlink("m/2.safetensors");
    put_shard("m/2.safetensors", "ca");
    ck_assert_int_eq(mkfifo("m/config.json", 0600), 0);
    is_refused("m", "m/config.json: not a regular file");
    unlink("m/config.json");
    ck_assert_int_eq(mkdir("m/config.json", 0700), 0);
    is_refused("m", "m/config.json: a folder");
}
END_TEST

START_TEST(links_within_the_folder_and_into_the_hub_cache_are_followed)
{
    mkdir("m/real", 0777);
    ck_assert_int_eq(rename("m/2.safetensors", "m/real/2.safetensors"), 0);
    ck_assert_int_eq(symlink("real/2.safetensors", "m/2.safetensors"), 0);
    has_all_four("m");

    mkdir("hub", 0777);
    mkdir("hub/blobs", 0777);
    mkdir("hub/snapshots", 0777);
    mkdir("hub/snapshots/rev", 0777);
    put_shard("hub/blobs/digest", "ac");
    ck_assert_int_eq(symlink("../../blobs/digest", "hub/snapshots/rev/model.safetensors"), 0);
    struct perta_checkpoint *ck;
    ck_assert_ok(perta_checkpoint_open("hub/snapshots/rev", &ck, &err));
    ck_assert_uint_eq(ck->n_tensors, 2);
    perta_checkpoint_close(ck);
    mkdir("hub/snapshots/rev/sub", 0777);
    ck_assert_int_eq(symlink("../../../blobs/digest", "hub/snapshots/rev/sub/model.safetensors"),
                     0);
    ck_assert_ok(perta_checkpoint_open("hub/snapshots/rev/sub", &ck, &err));
    perta_checkpoint_close(ck);
    /* not among the blobs */
    mkdir("hub/blobsx", 0777);
    ck_assert_int_eq(rename("hub/blobs/digest", "hub/blobsx/digest"), 0);
    unlink("hub/snapshots/rev/model.safetensors");
    ck_assert_int_eq(symlink("../../blobsx/digest", "hub/snapshots/rev/model.safetensors"), 0);
    is_refused("hub/snapshots/rev", "outside its folder");
}
END_TEST

START_TEST(what_is_no_checkpoint_is_refused_with_advice)
{
    is_refused("nowhere", "nowhere: no such file or folder");
    is_refused("m/1.safetensors/x", "no such file or folder");
    put_text("notes.txt", "x");
    is_refused("notes.txt", "neither a folder nor a .safetensors file");
    mkdir("empty", 0777);
    is_refused("empty", "no .safetensors file in this folder");
    put_text("empty/pytorch_model.bin", "x");
    is_refused("empty", "holds pytorch_model.bin");
    put_text("empty/adapter_config.json", "{}");
    is_refused("empty", "a PEFT adapter");
}
END_TEST

static const char *change; /* the change to m/2.safetensors, for messages */

/* Opening the second shard of ck again must fail, and so must the check of the whole checkpoint. */
static void is_found_out(const struct perta_checkpoint *ck)
{
    struct perta_file file;
    struct perta_err e[2] = {0};
    ck_assert_ok(perta_shard_open(&ck->shards[0], false, &file, &err));
    perta_file_close(&file);
    ck_assert_msg(perta_shard_open(&ck->shards[1], false, &file, &e[0]) == PERTA_EINPUT, "%s",
                  change);
    perta_file_close(&file);
    ck_assert_msg(perta_checkpoint_unchanged(ck, &e[1]) == PERTA_EINPUT, "%s", change);
    for (int i = 0; i < 2; i++)
        ck_assert_msg(strstr(e[i].msg, "m/2.safetensors: changed since"), "%s", e[i].msg);
}

static void take_time_back(const struct stat *st)
{
    const struct timespec times[] = {st->st_atim, st->st_mtim};
    ck_assert_int_eq(utimensat(AT_FDCWD, "m/2.safetensors", times, 0), 0);
}

START_TEST(a_shard_that_is_another_by_now_is_not_opened)
{
    struct stat st;
    for (int i = 0; i < 2; i++) {
        struct perta_checkpoint *ck;
        ck_assert_ok(perta_checkpoint_open("m", &ck, &err));
        ck_assert_ok(perta_checkpoint_unchanged(ck, &err));
        ck_assert_int_eq(stat("m/2.safetensors", &st), 0);
        struct timespec tick = {.tv_nsec = 20000000}; /* the resolution of file times */
        nanosleep(&tick, NULL);
        change = i ? "written over, with its time taken back" : "another in its place";
        if (!i) {
            put_shard("other", "ca");
            ck_assert_int_eq(rename("other", "m/2.safetensors"), 0);
        } else {
            FILE *file = fopen("m/2.safetensors", "r+");
            ck_assert_ptr_nonnull(file);
            ck_assert_int_eq(fseek(file, -1, SEEK_END), 0);
            ck_assert_int_eq(fputc('y', file), 'y');
            fclose(file);
        }
        take_time_back(&st);
        is_found_out(ck);
        perta_checkpoint_close(ck);
    }
}
END_TEST

START_TEST(a_config_that_changes_is_found_out)
{
    struct perta_checkpoint *ck;
    put_text("m/config.json", "{\"x\": 1}");
    ck_assert_ok(perta_checkpoint_open("m", &ck, &err));
    put_text("m/config.json", " {\"x\":1} ");
    ck_assert_ok(perta_checkpoint_unchanged(ck, &err));
    put_text("m/config.json", "{\"x\": 2}");
    ck_assert_int_eq(perta_checkpoint_unchanged(ck, &err), PERTA_EINPUT);
    ck_assert_ptr_nonnull(strstr(err.msg, "m/config.json: changed"));
    perta_checkpoint_close(ck);
}
END_TEST

START_TEST(the_config_of_an_adapter_that_changes_is_found_out)
{
    struct perta_checkpoint *ck;
    ck_assert_int_eq(mkdir("lora", 0777), 0);
    put_shard("lora/adapter_model.safetensors", "ab");
    put_text("lora/adapter_config.json", "{\"r\": 1}");
    ck_assert_ok(perta_checkpoint_open_adapter("lora", &ck, &err));
    put_text("lora/adapter_config.json", " {\"r\":1} ");
    ck_assert_ok(perta_checkpoint_unchanged(ck, &err));
    put_text("lora/adapter_config.json", "{\"r\": 2}");
    ck_assert_int_eq(perta_checkpoint_unchanged(ck, &err), PERTA_EINPUT);
    ck_assert_ptr_nonnull(strstr(err.msg, "lora/adapter_config.json: changed"));
    perta_checkpoint_close(ck);
}
END_TEST

START_TEST(a_model_that_transformers_would_not_load_is_not_taken_in_its_place)
{
    struct perta_checkpoint *ck;
    put_shard("m/model.safetensors", "abcd");
    is_refused("m", "holds two models: model.safetensors, which transformers loads, and the shards "
                    "that model.safetensors.index.json names (1.safetensors, ...)");
    ck_assert_ok(perta_checkpoint_open("m/model.safetensors", &ck, &err)); /* one is selected */
    perta_checkpoint_close(ck);
    put_text(INDEX, "{\"weight_map\":{\"a\":\"model.safetensors\",\"b\":\"model.safetensors\","
                    "\"c\":\"model.safetensors\",\"d\":\"model.safetensors\"}}");
    ck_assert_ok(perta_checkpoint_open("m", &ck, &err)); /* it is the same one */
    perta_checkpoint_close(ck);
    put_text("m/config.json", "{\"transformers_weights\": \"1.safetensors\"}");
    is_refused("m", "transformers_weights is 1.safetensors, which transformers loads; perta would "
                    "take model.safetensors");
    put_text("m/config.json", "{\"transformers_weights\": \"model.safetensors\"}");
    ck_assert_ok(perta_checkpoint_open("m", &ck, &err));
    perta_checkpoint_close(ck);
    put_text("m/adapter_config.json", "{}");
    ck_assert_ok(perta_checkpoint_open("m", &ck, &err)); /* there is no adapter to apply */
    perta_checkpoint_close(ck);
    put_text("m/adapter_model.bin", "x");
    is_refused("m", "holds a model (model.safetensors) and a PEFT adapter");
}
END_TEST

START_TEST(shards_without_an_index_are_of_one_model)
{
    ck_assert_int_eq(unlink(INDEX), 0);
    put_shard("m/consolidated.safetensors", "e");
    is_refused("m", "1.safetensors and consolidated.safetensors do not belong together");
    ck_assert_int_eq(rename("m/consolidated.safetensors", "m/adapter_model.safetensors"), 0);
    is_refused("m", "1.safetensors and adapter_model.safetensors do not belong together");
    struct perta_checkpoint *ck;
    ck_assert_int_eq(rename("m/1.safetensors", "m/model.safetensors"), 0);
    ck_assert_ok(
        perta_checkpoint_open("m", &ck, &err)); /* as in transformers: the others do not count */
    ck_assert_uint_eq(ck->n_tensors, 2);
    perta_checkpoint_close(ck);
}
END_TEST

START_TEST(a_folder_of_something_else_says_what_it_is)
{
    mkdir("x", 0777);
    put_text("x/training_args.bin", "x");
    is_refused("x", "holds training_args.bin, but no .safetensors file");
    put_text("x/y.gguf", "x");
    is_refused("x", "holds y.gguf, but no .safetensors file; GGUF is made from a model");
    put_text("x/model-00001-of-00002.bin", "x");
    is_refused("x", "holds model-00001-of-00002.bin, but");
    is_refused("x/y.gguf", "neither a folder nor a .safetensors file; GGUF is made");
    is_refused("x/training_args.bin", "neither a folder nor a .safetensors file; load it with");

    mkdir("parent", 0777);
    mkdir("parent/default", 0777);
    put_text("parent/default/adapter_config.json", "{}");
    is_refused("parent", "is parent/default meant? It is a PEFT adapter");
    mkdir("models--x--y", 0777);
    mkdir("models--x--y/blobs", 0777);
    mkdir("models--x--y/snapshots", 0777);
    is_refused("models--x--y",
               "a folder of the Hugging Face cache; give the folder below snapshots/");
    mkdir("models--x--y/snapshots/8a3f", 0777);
    is_refused("models--x--y", "snapshots/: models--x--y/snapshots/8a3f");
    put_shard("models--x--y/snapshots/8a3f/model.safetensors", "a");
    is_refused("models--x--y/snapshots",
               "is models--x--y/snapshots/8a3f meant? It is a checkpoint");

    put_text("empty.json", "{}");
    ck_assert_int_eq(perta_which_kind("empty.json"), PERTA_KIND_FILE);
    ck_assert_int_eq(perta_which_kind("m"), PERTA_KIND_CHECKPOINT);
    ck_assert_int_eq(perta_which_kind("m/1.safetensors"), PERTA_KIND_WEIGHTS);
    ck_assert_int_eq(perta_which_kind("models--x--y"), PERTA_KIND_CACHE);
    ck_assert_int_eq(perta_which_kind("nowhere"), PERTA_KIND_UNKNOWN);
    ck_assert_int_eq(perta_which_kind("."), PERTA_KIND_UNKNOWN);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("checkpoint");
    tcase_add_checked_fixture(tests, enter_model, leave);
    tcase_add_test(tests, tensors_are_found_with_an_index_and_without);
    tcase_add_test(tests, one_file_is_a_checkpoint_too);
    tcase_add_test(tests, a_config_that_is_not_json_is_no_config);
    tcase_add_test(tests, an_index_that_shards_do_not_bear_out_is_refused);
    tcase_add_test(tests, a_tensor_in_two_shards_is_refused);
    tcase_add_test(tests, a_damaged_shard_is_named);
    tcase_add_test(tests, what_is_no_regular_file_in_the_folder_is_refused_at_once);
    tcase_add_test(tests, links_within_the_folder_and_into_the_hub_cache_are_followed);
    tcase_add_test(tests, what_is_no_checkpoint_is_refused_with_advice);
    tcase_add_test(tests, a_shard_that_is_another_by_now_is_not_opened);
    tcase_add_test(tests, a_config_that_changes_is_found_out);
    tcase_add_test(tests, the_config_of_an_adapter_that_changes_is_found_out);
    tcase_add_test(tests, a_model_that_transformers_would_not_load_is_not_taken_in_its_place);
    tcase_add_test(tests, shards_without_an_index_are_of_one_model);
    tcase_add_test(tests, a_folder_of_something_else_says_what_it_is);
    return run_suite("checkpoint", tests);
}
