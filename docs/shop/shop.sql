-- A small shop: five tables, for "your own database in ten minutes" in docs/own_database.md.
CREATE TABLE customer (customer_id INTEGER PRIMARY KEY, name TEXT, city TEXT, joined_year INTEGER);
CREATE TABLE product (product_id INTEGER PRIMARY KEY, name TEXT, category TEXT, price REAL, stock INTEGER);
CREATE TABLE purchase (purchase_id INTEGER PRIMARY KEY, customer_id INTEGER REFERENCES customer (customer_id),
                       day TEXT, status TEXT);
CREATE TABLE item (purchase_id INTEGER REFERENCES purchase (purchase_id),
                   product_id INTEGER REFERENCES product (product_id), quantity INTEGER);
CREATE TABLE review (review_id INTEGER PRIMARY KEY, product_id INTEGER REFERENCES product (product_id),
                     customer_id INTEGER REFERENCES customer (customer_id), stars INTEGER);
INSERT INTO customer VALUES
 (1, 'Ada Novak', 'Lisbon', 2019), (2, 'Ben Okafor', 'Lagos', 2020), (3, 'Chloe Martin', 'Paris', 2020),
 (4, 'Dmitri Orlov', 'Paris', 2021), (5, 'Elif Kaya', 'Ankara', 2021), (6, 'Farid Haddad', 'Lisbon', 2022),
 (7, 'Grace Lee', 'Seoul', 2022), (8, 'Hugo Silva', 'Lisbon', 2023), (9, 'Ines Costa', 'Paris', 2023),
 (10, 'Jonas Berg', 'Oslo', 2024);
INSERT INTO product VALUES
 (1, 'teapot', 'kitchen', 24.5, 12), (2, 'kettle', 'kitchen', 39.0, 5), (3, 'mug', 'kitchen', 8.0, 80),
 (4, 'desk lamp', 'office', 45.0, 9), (5, 'notebook', 'office', 4.5, 200), (6, 'fountain pen', 'office', 32.0, 15),
 (7, 'tent', 'outdoor', 129.0, 3), (8, 'sleeping bag', 'outdoor', 79.0, 7), (9, 'lantern', 'outdoor', 21.0, 0),
 (10, 'chess set', 'games', 55.0, 6), (11, 'playing cards', 'games', 6.0, 60), (12, 'kite', 'outdoor', 18.0, 11);
INSERT INTO purchase VALUES
 (1, 1, '2024-01-05', 'delivered'), (2, 1, '2024-02-11', 'delivered'), (3, 2, '2024-02-14', 'returned'),
 (4, 3, '2024-03-01', 'delivered'), (5, 4, '2024-03-20', 'shipped'), (6, 3, '2024-04-02', 'delivered'),
 (7, 5, '2024-04-18', 'cancelled'), (8, 6, '2024-05-09', 'delivered'), (9, 7, '2024-05-30', 'shipped'),
 (10, 8, '2024-06-12', 'delivered'), (11, 1, '2024-06-20', 'shipped'), (12, 9, '2024-07-01', 'delivered');
INSERT INTO item VALUES
 (1, 1, 1), (1, 3, 4), (2, 5, 10), (3, 7, 1), (4, 10, 1), (4, 11, 2), (5, 4, 1), (5, 6, 2), (6, 3, 6), (6, 2, 1),
 (7, 8, 2), (8, 5, 3), (8, 6, 1), (9, 12, 2), (10, 7, 1), (10, 8, 2), (10, 9, 3), (11, 2, 1), (12, 10, 1), (12, 5, 5);
INSERT INTO review VALUES
 (1, 1, 1, 5), (2, 3, 1, 4), (3, 7, 2, 2), (4, 10, 3, 5), (5, 3, 3, 5), (6, 5, 6, 4), (7, 7, 8, 5), (8, 9, 8, 1),
 (9, 10, 9, 4), (10, 5, 1, 3), (11, 2, 3, 4), (12, 6, 4, 5);
